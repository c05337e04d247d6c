"""What a merge method is: a frozen record around one pure function on the Deltas of one site."""

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
from mergekit_bert.option import read_pairs, told_range
from mergekit_bert.registry import Registry, unknown

ENSEMBLE = "ensemble"
"""What stands in a method's place where nothing is merged."""
ALL_SPACES = ("full", "core", "knots")
NEEDS = {
    "basis": "adapters that share one orthogonal basis (train-adapter's default)",
    "gram": "Gram matrices of the sites' inputs (trained with `with_stats=gram`, or `data` or `texts`)",
    "fisher": "Fisher information (trained with `with_stats=fisher`, or `data` or `texts`)",
    "rows": "unlabelled rows of every task (`data` or `texts`), if need be `data=synthetic`",
}
"""What a method may need, and how to meet it."""


@dataclass(frozen=True)
class Site:
    """What a method sees of one site: the Deltas of those adapters that have it, in the coordinates of the space.

    ``names``, ``deltas``, ``weights`` and ``statistics`` go together. ``statistics`` has what the method needs, by its
    name (``gram``, ``fisher``). ``survey`` is what the method's own survey of all sites found.
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
        """A generator of its own for an adapter at this site: the same whatever else is merged, in whatever order."""
        digest = hashlib.sha256(f"{self.name}\n{name}".encode()).digest()
        return generator(self.seed, int.from_bytes(digest[:6], "big"))


@dataclass(frozen=True)
class LearningContext:
    """What a method that learns gets: the inputs, the encoder, rows of every task without labels, its options.

    ``merge(method, **changes)`` gives the Deltas of another merge of the same inputs and weights, to start from.
    ``folder`` is where unfinished work may be kept (None: nowhere).
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
    """What a method learned: either weights (``layers``: by site name, then by adapter) or the Deltas themselves.

    ``trace`` is what a reader of the file may want to know: numbers and texts only.
    """

    weights: Mapping[str, float] | None = None
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    deltas: Mapping[str, Delta] | None = None
    trace: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


def ones(merge_inputs: Sequence[MergeInput]) -> list[float]:
    """1 each."""
    return [1.0] * len(merge_inputs)


def _no_check(merge_inputs: Sequence[MergeInput]) -> None:
    """Any adapters will do."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    ``merge`` combines the Deltas of one :class:`Site`; a site that an adapter does not have is a zero Delta and not
    in the list. ``weights`` gives the weights ``λi`` where the user names none; every method is homogeneous in them:
    weights times ``w`` give the result times ``w``. ``options`` is a frozen dataclass of
    :func:`~mergekit_bert.option.option` fields; ``needs`` names entries of :data:`NEEDS`, and ``rows`` is how many of
    each task do it good; ``spaces`` are those where it is defined. ``linear``: the same in every space, and stays in
    factors. ``random``: it draws from the seed. ``one_stays``: options under which a merge of one adapter is that
    adapter, None where it never is. ``survey`` looks at all sites before the first is merged; ``learn`` finds
    weights or Deltas on rows.
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
    kinds = get_type_hints(method.options)
    fields = {one.name: one for one in dataclasses.fields(method.options)}
    chosen = {}
    for name, value in given.items():
        if name not in fields:
            if not fields:
                raise CompositionError(
                    f"option {name!r} of {method.name}", "no such option", "none: it has no options", "drop it"
                )
            raise unknown(f"option of {method.name}", name, list(fields))
        chosen[name] = _read(f"option {name!r} of {method.name}", value, kinds[name], fields[name].metadata)
    return method.options(**chosen)


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """``["density=0.2"]`` as names and values (numbers where they are some); raises ArgumentError."""
    return {name: _number(value) for name, value in read_pairs(texts).items()}


_LARGEST = 1e9
"""Beyond it no option means anything, and sums overflow."""


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read(where: str, value: Any, kind: type, metadata: Any) -> Any:
    """``value`` as ``kind``, within its range."""
    expected = told_range(metadata, kind)
    wrong = CompositionError(where, f"{value!r}", expected, "correct it (`mbert methods` lists all options)")
    if kind is bool:
        known = {"true": True, "false": False}
        if not isinstance(value, bool) and str(value).lower() not in known:
            raise wrong
        return value if isinstance(value, bool) else known[str(value).lower()]
    if kind is str:
        if not isinstance(value, str) or (metadata["choices"] and value not in metadata["choices"]):
            raise wrong
        return value
    try:
        number = kind(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    low, high = metadata["low"], metadata["high"]
    inside = number is not None and abs(number) <= _LARGEST  # neither NaN nor infinite
    if not inside or (low is not None and number < low) or (high is not None and number > high):
        raise wrong
    if kind is int and not isinstance(value, str) and number != value:
        raise wrong
    return number


def chosen_weights(method: Method, merge_inputs: Sequence[MergeInput], given: Mapping[str, float]) -> dict[str, float]:
    """The weight of every input by name: given ones first, the method's own for the rest."""
    if all(one.name in given for one in merge_inputs):
        return {one.name: given[one.name] for one in merge_inputs}
    own = method.weights(merge_inputs)
    return {one.name: given.get(one.name, weight) for one, weight in zip(merge_inputs, own, strict=True)}
