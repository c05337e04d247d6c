"""A decorator that makes a merge method of a function, for notebooks and plug-ins."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any, get_type_hints

from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.method import METHODS, Method, NoOptions, Site
from mergekit_bert.errors import PluginError
from mergekit_bert.option import option

Merge = Callable[..., Delta | Tensor]


def method(*, name: str, description: str, **fields: Any) -> Callable[[Merge], Method]:
    """Register the decorated function as the merge method ``name``; the decorated name is then the ``Method`` record.

    The function receives a :class:`~mergekit_bert.composing.method.Site` and returns a Delta or a matrix ``(out, in)``.
    Its other parameters are the method's options: each needs a type (bool, int, float or str) and a default, which may
    be an :func:`~mergekit_bert.option.option` with a help text and a range. ``fields`` are further fields of
    :class:`~mergekit_bert.composing.method.Method`, such as ``one_stays=None`` if a merge of one adapter changes it.
    Raises PluginError for a name that exists already, or invalid options.
    """

    def register(function: Merge) -> Method:
        record = Method(
            **{"formula": f"Δ = {name}(λ1 Δ1, λ2 Δ2, …)", "source": f"{function.__module__}.{function.__qualname__}"}
            | fields,
            name=name,
            description=description,
            merge=functools.partial(_merge, function),
            options=_options(name, function),
        )
        return METHODS.add(record)

    return register


def _merge(function: Merge, site: Site) -> Delta:
    found = function(site, **vars(site.options))
    return Dense(found) if isinstance(found, Tensor) else found


def _options(name: str, function: Merge) -> type[Any]:
    """A frozen dataclass of the parameters after the first."""
    _, *parameters = inspect.signature(function).parameters.values()
    if not parameters:
        return NoOptions
    hints = get_type_hints(function)
    fields = []
    for parameter in parameters:
        type_ = hints.get(parameter.name)
        if type_ not in (bool, int, float, str) or parameter.default is parameter.empty:
            raise PluginError(
                f"merge method {name!r}",
                f"the parameter {parameter.name!r} as {parameter}",
                "a type (bool, int, float or str) and a default, as of an option",
                "correct it",
            )
        known = isinstance(parameter.default, type(field()))
        fields.append(
            (parameter.name, type_, parameter.default if known else option(parameter.default, parameter.name))
        )
    return make_dataclass("Options", fields, frozen=True)
