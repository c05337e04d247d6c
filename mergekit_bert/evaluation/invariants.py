"""Invariants: what every merge method keeps to, tried on one's own adapters.

Merges are tried at one site of each kind, spread over the layers, or at every site; the linear sum and the spaces
always at every site. Errors are Frobenius norms beside the largest input's (or the result's, where it is larger).
Statistics that the files do not have are measured on rows where some are given, else methods that need them are left
out. Methods that learn need rows too, and are tried before their first step: what is fitted invariants nothing.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bert.adapters.delta import norm
from mergekit_bert.composing.composition import Merged, as_merged
from mergekit_bert.composing.file import read_model, write_model
from mergekit_bert.composing.lazy import LazyMap
from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, finite_delta, merge_weights, with_statistics
from mergekit_bert.composing.method import METHODS, Method
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.errors import MbertError
from mergekit_bert.progress import progress_bar

TOLERANCE = 1e-5
"""Rounding of float32 factors through a few products."""
ALONE = "one adapter stays itself"
ORDER = "the order does not matter"
LINEAR = "a linear merge is the dense sum"
LOSSLESS = "a space loses nothing"
RELOADED = "the file gives the same bits"
MERGED = "what is not refused is merged"

Entries = Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One invariant tried: the worst error, and where it was found."""

    invariant: str
    what: str
    error: float
    where: str
    tolerance: float = TOLERANCE

    @property
    def kept(self) -> bool:
        """Whether the invariant was kept."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Invariants:
    """All that was tried, and why the other methods were left out."""

    checks: Sequence[Check]
    left_out: Mapping[str, str]

    @property
    def broken(self) -> list[Check]:
        """The invariants that were not kept."""
        return [one for one in self.checks if not one.kept]


def kind_of(site: str) -> str:
    """A site's name without the numbers of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", site)


def one_of_each_kind(merge_inputs: Sequence[MergeInput]) -> list[str]:
    """A site of each kind (and of each set of adapters that have it), the first kind's in the first layer and so on."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for site in dict.fromkeys(site for one in merge_inputs for site in one.deltas):
        holders = (one.name for one in merge_inputs if site in one.deltas)
        kinds.setdefault((kind_of(site), *holders), []).append(site)
    last = max(1, len(kinds) - 1)
    return [sites[round(place / last * (len(sites) - 1))] for place, sites in enumerate(kinds.values())]


def try_invariants(
    merge_inputs: Sequence[MergeInput],
    methods: Sequence[str] | None = None,
    every_site: bool = False,
    show: bool = False,
    given: MergeContext | None = None,
) -> Invariants:
    """Try every method (or ``methods``) in every space; ``given`` has the rows that some of them need.

    Raises CompositionError for what can never be merged, UnknownNameError for an unknown method.
    """
    check_together(merge_inputs)
    names = METHODS.names() if methods is None else methods
    chosen = set(one_of_each_kind(merge_inputs))
    checks = [_lossless(merge_inputs, space) for space in SPACES if space != "full"]
    left_out: dict[str, str] = {}
    with progress_bar("invariants", len(names), show) as bar:
        for number, name in enumerate(names):
            bar(number, name)
            method = METHODS.get(name)
            try:
                Recipe(name, weights=_weights(merge_inputs)).check(merge_inputs)
                known = with_statistics(method, merge_inputs, given)
                tried = known if every_site else [_at(one, chosen) for one in known]
                if method.learn is not None:  # it tells what it refuses only when it starts
                    _merged(tried, _unlearned(method, "full"), given)
            except MbertError as error:
                left_out[name] = str(error)
                continue
            if method.linear and method.learn is None:
                checks.append(_linear(known, method))
            for space in ("full",) if method.linear else method.spaces:
                checks += _of_method(tried, method, space, given)
    return Invariants(checks, left_out)


def _at(one: MergeInput, sites: set[str]) -> MergeInput:
    """``one`` with Deltas at ``sites`` alone."""
    return replace(one, deltas={site: finite_delta(one, site) for site in one.deltas if site in sites})


def _unlearned(method: Method, space: str) -> Recipe:
    """The method with its defaults; one that learns with the options under which it takes no step."""
    return Recipe(method.name, space, (method.one_stays or {}) if method.learn is not None else {})


def _of_method(
    merge_inputs: Sequence[MergeInput], method: Method, space: str, given: MergeContext | None
) -> list[Check]:
    what = method.name if space == "full" else f"{method.name} in {space}"
    try:
        return list(_tried(merge_inputs, method, space, what, given))
    except MbertError as error:
        return [Check(MERGED, what, math.inf, str(error))]


def _tried(
    merge_inputs: Sequence[MergeInput], method: Method, space: str, what: str, given: MergeContext | None
) -> Iterator[Check]:
    if method.one_stays is not None:
        recipe = Recipe(method.name, space, method.one_stays)
        yield Check(
            ALONE,
            what,
            *max(
                _apart(_dense(_merged([one], recipe, given)), _dense(one), _sizes([one]))
                for one in merge_inputs
                if one.parts
            ),
        )
    recipe = _unlearned(method, space)
    model = _merged(merge_inputs, recipe, given)
    if not method.order_matters and len(merge_inputs) > 1:
        exact, sizes, places = _dense(model), _sizes(merge_inputs), range(len(merge_inputs))
        orders = sorted({(*places[1:], 0), tuple(reversed(places))})
        again = (_dense(_merged([merge_inputs[place] for place in order], recipe, given)) for order in orders)
        yield Check(ORDER, what, *max(_apart(other, exact, sizes) for other in again))
    yield Check(RELOADED, what, *_reloaded(model), tolerance=0.0)


def _weights(merge_inputs: Sequence[MergeInput]) -> dict[str, float]:
    """1, 1/2, 1/3, …, by name: uneven, so that a weight of the wrong adapter shows."""
    return {name: 1 / place for place, name in enumerate(sorted(one.name for one in merge_inputs), 1)}


def _merged(
    merge_inputs: Sequence[MergeInput], recipe: Recipe, given: MergeContext | None = None, lazy: bool = False
) -> Merged:
    return merge_weights(merge_inputs, replace(recipe, weights=_weights(merge_inputs)), given, lazy)


def _linear(merge_inputs: Sequence[MergeInput], method: Method) -> Check:
    model = _merged(merge_inputs, Recipe(method.name), lazy=True)
    parts, weights = {one.name: _dense(one) for one in merge_inputs}, _weights(merge_inputs)

    def total(name: str) -> Tensor:
        return torch.stack([weights[own] * part[name] for own, part in parts.items() if name in part]).sum(0)

    exact = LazyMap(dict.fromkeys(name for part in parts.values() for name in part), total)
    return Check(LINEAR, method.name, *_apart(_dense(model), exact, _sizes(merge_inputs)))


def _lossless(merge_inputs: Sequence[MergeInput], space: str) -> Check:
    """``leave(enter(Δi)) = Δi`` at every site."""
    worst, where = 0.0, ""
    for site in dict.fromkeys(site for one in merge_inputs for site in one.deltas):
        holders = [one for one in merge_inputs if site in one.deltas]
        deltas = [finite_delta(one, site) for one in holders]
        inner, leave = SPACES[space].enter(deltas)
        for delta, inside in zip(deltas, inner, strict=True):
            back, exact = leave(inside).to(torch.float64).dense(), delta.to(torch.float64).dense()
            error = _ratio(float((back - exact).norm()), norm(delta))
            worst, where = max((worst, where), (error, site))
    return Check(LOSSLESS, space, worst, where)


def _reloaded(model: Merged) -> tuple[float, str]:
    """The largest difference between ``model`` and what its file gives back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged.safetensors"
        try:
            write_model(path, model)
            again = as_merged(read_model(path), str(path), "no merged model", "a merged one", "write it again")
        except MbertError as error:
            return math.inf, str(error)
    if (again.weights, again.recipe, list(again.parts)) != (model.weights, model.recipe, list(model.parts)):
        return math.inf, "its record"
    one, two = _tensors(model), _tensors(again)
    if one.keys() != two.keys() or any(one[name].shape != two[name].shape for name in one):
        return math.inf, "names or shapes of its tensors"
    apart = [(float((one[name] - two[name]).abs().max()), name) for name in one if one[name].numel()]
    return max(apart, default=(0.0, ""))


def _tensors(model: Merged) -> dict[str, Tensor]:
    """Everything in a merged model, factors apart."""
    found = dict(model.shifts)
    deltas = {**model.deltas}
    for task, own in model.own.items():
        deltas |= {f"{task}: {site}": delta for site, delta in own.deltas.items()}
        found |= {f"{task}: {name}": tensor for name, tensor in {**own.shifts, **own.head}.items()}
        found |= {f"{task}: {name}.{key}": one for name, values in own.extras.items() for key, one in values.items()}
    for site, delta in deltas.items():
        found |= {f"{site}.{name}": tensor for name, tensor in delta.tensors().items()}
    return found


def _dense(model: MergeInput | Merged) -> Entries:
    """Deltas and shifts in float64, made when asked for."""

    def make(name: str) -> Tensor:
        delta = model.deltas.get(name)
        return model.shifts[name].double() if delta is None else delta.to(torch.float64).dense()

    return LazyMap([*model.deltas, *model.shifts], make)


def _sizes(merge_inputs: Sequence[MergeInput]) -> dict[str, float]:
    """The largest input's norm, by name."""
    found: dict[str, float] = {}
    for one in merge_inputs:
        own = {site: norm(delta) for site, delta in one.deltas.items()}
        own |= {name: float(shift.double().norm()) for name, shift in one.shifts.items()}
        found = {name: max(found.get(name, 0.0), own.get(name, 0.0)) for name in {**found, **own}}
    return found


def _apart(found: Entries, exact: Entries, sizes: Mapping[str, float]) -> tuple[float, str]:
    """The worst error and its name."""
    if set(found) != set(exact):
        return math.inf, min(set(found) ^ set(exact))
    worst = (0.0, "")
    for name in exact:
        right = exact[name]
        error = _ratio(float((found[name] - right).norm()), max(sizes[name], float(right.norm())))
        worst = max(worst, (error, name))
    return worst


def _ratio(error: float, size: float) -> float:
    """``error / size``; what is not finite, or not zero beside nothing, is infinite."""
    if not math.isfinite(error) or (size == 0 and error > 0):
        return math.inf
    return error / size if size > 0 else 0.0
