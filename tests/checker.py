"""Annotations of the package, checked while the tests run: types by beartype, and shapes by jaxtyping.

jaxtyping's import hook decorates every function with ``jaxtyping.jaxtyped``, which costs two fifths of the tests' time:
it binds the arguments of every call, even of a function without shapes, and it makes the checks of a nested function
anew whenever the function around it is called. Here a function without shapes gets beartype alone, and a nested
function the checks that were made the first time.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ForwardRef, get_args

import jaxtyping
from jaxtyping import AbstractArray, install_import_hook

_WRAPPED = "__beartype_func"
"""The argument in which a function that beartype made keeps the one that it checks."""
_with_shapes = jaxtyping.jaxtyped
_made: dict[Any, types.FunctionType] = {}


def install(package: str) -> None:
    """Check all annotations of functions and dataclasses in modules that are imported from now on."""
    jaxtyping.jaxtyped = _checked
    install_import_hook(package, "beartype.beartype")


def _checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """What the hook puts above each class and function, in place of ``jaxtyping.jaxtyped``."""

    def decorate(found: Any) -> Any:
        if not inspect.isclass(found):
            return _function(found, typechecker)
        if dataclasses.is_dataclass(found) and "__init__" in vars(found):
            found.__init__ = _function(found.__init__, typechecker)  # type: ignore[misc]
        return found

    return decorate


def _function(found: types.FunctionType, typechecker: Callable[..., Any]) -> Any:
    hints = found.__annotations__
    if any(map(_may_have_shapes, hints.values())):
        return _with_shapes(found, typechecker=typechecker)
    key = (found.__module__, found.__qualname__, found.__code__, *hints.items())
    made = _made.get(key)
    if made is None:
        made = _made[key] = typechecker(found)
    if _WRAPPED not in (made.__kwdefaults__ or {}):
        return found  # without annotations
    new = types.FunctionType(made.__code__, made.__globals__, closure=made.__closure__)
    new.__kwdefaults__ = {**made.__kwdefaults__, _WRAPPED: found}
    return functools.update_wrapper(new, found)


def _may_have_shapes(hint: Any) -> bool:
    """Whether a shape is in ``hint``, or a name that is not resolved yet."""
    if isinstance(hint, str | ForwardRef) or (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return True
    return any(map(_may_have_shapes, hint if isinstance(hint, list) else get_args(hint)))
