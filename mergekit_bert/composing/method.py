"""The record of a merge method: a pure function on the Deltas of one site, its options and requirements."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch

from mergekit_bert.adapters.delta import Delta
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.hardware import generator
from mergekit_bert.option import allowed_values, read_pairs
from mergekit_bert.registry import Registry, unknown

ENSEMBLE = "ensemble"
"""The name used instead of a method if nothing is merged."""
ALL_SPACES = ("full", "core", "knots")
NEEDS = {
    "basis": "adapters that share one orthogonal basis (train-adapter's default)",
    "gram": "Gram matrices of the sites' inputs (trained with `with_stats=gram`, or `data` or `texts`)",
    "fisher": "Fisher information (trained with `with_stats=fisher`, or `data` or `texts`)",
    "rows": "unlabelled rows of every task (`data` or `texts`; `data=synthetic` if there are none)",
}
"""What a method may need, and how to provide it."""


@dataclass(frozen=True)
class Site:
    """The Deltas of one site, in the coordinates of the space, of those adapters that have the site.

    ``names``, ``deltas``, ``weights`` and ``statistics`` have one entry per adapter. ``statistics`` are those that the
    method needs, by name (``gram``, ``fisher``). ``survey`` is the result of the method's survey of all sites.
    """

    name: str
    names: Sequence[str]
    deltas: Sequence[Delta]
    weights: Sequence[float]
    options: Any = None
    seed: int = 0
    statistics: Sequence[Mapping[str, Any]] = ()
    survey: Any = None

    @cached_property
    def weighted(self) -> list[Delta]:
        """``λi Δi``."""
        return [delta.scaled(weight) for delta, weight in zip(self.deltas, self.weights, strict=True)]

    def generator(self, name: str) -> torch.Generator:
        """A random generator for one adapter at this site, independent of the other inputs and of their order."""
        digest = hashlib.sha256(f"{self.name}\n{name}".encode()).digest()
        return generator(self.seed, int.from_bytes(digest[:6], "big"))


@dataclass(frozen=True)
class LearningContext:
    """The arguments of a method that learns: inputs, encoder, unlabelled rows of every task, its options.

    ``merge(method, **changes)`` returns the Deltas of another merge of the same inputs and weights, to start from.
    ``folder`` is where checkpoints may be written (None: nowhere).
    """

    merge_inputs: Sequence[MergeInput]
    weights: Mapping[str, float]
    options: Any
    encoder: Encoder
    rows: Mapping[str, Rows]
    rank: int | None
    seed: int
    merge: Callable[..., dict[str, Delta]]
    folder: Path | None = None
    show: bool = False


@dataclass(frozen=True)
class Learned:
    """The result of a method that learns: weights (``layers``: by site name, then by adapter), or merged Deltas.

    ``trace`` is recorded in the merged file: numbers and texts only.
    """

    weights: Mapping[str, float] | None = None
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deltas: Mapping[str, Delta] | None = None
    trace: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


def ones(merge_inputs: Sequence[MergeInput]) -> list[float]:
    """A weight of 1 for each input."""
    return [1.0] * len(merge_inputs)


def _no_check(merge_inputs: Sequence[MergeInput]) -> None:
    """Accept any inputs."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    ``merge`` combines the Deltas of one :class:`Site`; adapters without the site count as a zero Delta and are not
    listed. ``weights`` returns the default weights ``λi``; every method is homogeneous in the weights: weights times
    ``w`` give the result times ``w``. ``options`` is a frozen dataclass of :func:`~mergekit_bert.option.option` fields.
    ``needs`` lists what it needs (``basis``, ``gram``, ``fisher``, ``rows``), and ``rows`` is the default number of
    rows per task. ``spaces`` are those where it is defined. ``linear``: the result is the same in every space, and
    stays in factors. ``random``: it draws from the seed. ``one_stays``: options with which a merge of one adapter
    returns that adapter, None if it never does. ``survey`` looks at all sites before the first is merged; ``learn``
    finds weights or Deltas on rows.
    """

    name: str
    description: str
    formula: str
    source: str
    merge: Callable[[Site], Delta]
    weights: Callable[[Sequence[MergeInput]], list[float]] = ones
    default_weights: str = "1 each"
    options: type[Any] = NoOptions
    needs: tuple[str, ...] = ()
    rows: int = 256
    spaces: tuple[str, ...] = ALL_SPACES
    check: Callable[[Sequence[MergeInput]], None] = _no_check
    survey: Callable[[Sequence[Site]], Any] | None = None
    learn: Callable[[LearningContext], Learned] | None = None
    linear: bool = False
    random: bool = False
    order_matters: bool = False
    one_stays: Mapping[str, Any] | None = field(default_factory=dict)


METHODS = Registry("mergekit_bert.composing.methods", "merge method", Method, "mbert.methods", taken=(ENSEMBLE,))


def make_options(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's options with ``given`` values (texts are read as numbers); raises CompositionError."""
    types = get_type_hints(method.options)
    fields = {option.name: option for option in dataclasses.fields(method.options)}
    chosen = {}
    for name, value in given.items():
        if name not in fields:
            if not fields:
                raise CompositionError(f"option {name!r} of {method.name}", "no such option", "no options", "drop it")
            raise unknown(f"option of {method.name}", name, list(fields))
        chosen[name] = _read(f"option {name!r} of {method.name}", value, types[name], fields[name].metadata)
    return method.options(**chosen)


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """``["density=0.2"]`` as names and values (as numbers if possible); raises ArgumentError."""
    return {name: _number(value) for name, value in read_pairs(texts).items()}


_LARGEST = 1e9
"""Limit for numeric options, beyond which sums overflow."""


def _number(text: str) -> float | int | str:
    for type_ in (int, float):
        try:
            return type_(text)
        except ValueError:
            continue
    return text


def _read(where: str, value: Any, type_: type, metadata: Any) -> Any:
    """``value`` as ``kind``, within its range."""
    expected = allowed_values(metadata, type_)
    wrong = CompositionError(where, f"{value!r}", expected, "correct it (`mbert methods` lists all options)")
    if type_ is bool:
        known = {"true": True, "false": False}
        if not isinstance(value, bool) and str(value).lower() not in known:
            raise wrong
        return value if isinstance(value, bool) else known[str(value).lower()]
    if type_ is str:
        if not isinstance(value, str) or (metadata["choices"] and value not in metadata["choices"]):
            raise wrong
        return value
    try:
        number = type_(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    low, high = metadata["low"], metadata["high"]
    inside = number is not None and abs(number) <= _LARGEST  # neither NaN nor infinite
    if not inside or (low is not None and number < low) or (high is not None and number > high):
        raise wrong
    if type_ is int and not isinstance(value, str) and number != value:
        raise wrong
    return number


def chosen_weights(method: Method, merge_inputs: Sequence[MergeInput], given: Mapping[str, float]) -> dict[str, float]:
    """The weight of every input by name: the given one, or the method's default."""
    if all(merge_input.name in given for merge_input in merge_inputs):
        return {merge_input.name: given[merge_input.name] for merge_input in merge_inputs}
    defaults = method.weights(merge_inputs)
    return {
        merge_input.name: given.get(merge_input.name, weight)
        for merge_input, weight in zip(merge_inputs, defaults, strict=True)
    }
