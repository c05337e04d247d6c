"""Invariants: properties that every merge method must have, checked on the user's adapters.

Merges are checked at one site of each kind, spread over the layers, or at every site; linear sums and spaces always at
every site. Errors are Frobenius norms relative to that of the largest input (or of the result, if it is larger).
Statistics that the files lack are measured on rows, if there are any; otherwise methods that need them are left out.
Methods that learn also need rows, and are checked before their first step, because fitted results satisfy no invariant.
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
from mergekit_bert.composing.lazy import LazyMap
from mergekit_bert.composing.merge_input import MergeInput, check_together
from mergekit_bert.composing.merging import MergeContext, finite_delta, merge_weights, with_statistics
from mergekit_bert.composing.method import METHODS, Method
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.errors import MbertError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.composition import Merged, as_merged
from mergekit_bert.progress import progress_bar

TOLERANCE = 1e-5
"""Rounding error of a few products of float32 factors."""
ALONE = "merging one adapter returns it"
ORDER = "the order of the inputs does not matter"
LINEAR = "a linear merge equals the dense sum"
LOSSLESS = "conversion to a space and back loses nothing"
RELOADED = "a saved file is read with the same bits"
MERGED = "a merge that is not refused succeeds"

Entries = Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One invariant checked on one method or space (``what``): the worst error, and where it occurred."""

    invariant: str
    what: str
    error: float
    where: str
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Invariants:
    """All checks, and why other methods were left out."""

    checks: Sequence[Check]
    left_out: Mapping[str, str]

    @property
    def violated(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.holds]


def site_kind(site: str) -> str:
    """A site's name without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", site)


def one_of_each_kind(merge_inputs: Sequence[MergeInput]) -> list[str]:
    """One site of each kind (and of each set of adapters that have it), from the first layer to the last."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for site in _all_sites(merge_inputs):
        holders = (merge_input.name for merge_input in merge_inputs if site in merge_input.deltas)
        kinds.setdefault((site_kind(site), *holders), []).append(site)
    last = max(1, len(kinds) - 1)
    return [sites[round(place / last * (len(sites) - 1))] for place, sites in enumerate(kinds.values())]


def _all_sites(merge_inputs: Sequence[MergeInput]) -> list[str]:
    return list(dict.fromkeys(site for merge_input in merge_inputs for site in merge_input.deltas))


def check_invariants(
    merge_inputs: Sequence[MergeInput],
    methods: Sequence[str] | None = None,
    every_site: bool = False,
    show: bool = False,
    context: MergeContext | None = None,
) -> Invariants:
    """Check every method (or ``methods``) in every space; ``context`` provides the rows that some of them need.

    Raises CompositionError for inputs that no method can merge, UnknownNameError for an unknown method.
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
                complete = with_statistics(method, merge_inputs, context)
                reduced = complete if every_site else [_restricted(merge_input, chosen) for merge_input in complete]
                if method.learn is not None:  # it refuses inputs only when it starts
                    _merged(reduced, _unlearned(method, "full"), context)
            except MbertError as error:
                left_out[name] = str(error)
                continue
            if method.linear and method.learn is None:
                checks.append(_linear(complete, method))
            for space in ("full",) if method.linear else method.spaces:
                checks += _of_method(reduced, method, space, context)
    return Invariants(checks, left_out)


def _restricted(merge_input: MergeInput, sites: set[str]) -> MergeInput:
    """``merge_input`` with Deltas only at ``sites``."""
    deltas = {site: finite_delta(merge_input, site) for site in merge_input.deltas if site in sites}
    return replace(merge_input, deltas=deltas)


def _unlearned(method: Method, space: str) -> Recipe:
    """The method with its default options; a method that learns with options under which it takes no step."""
    return Recipe(method.name, space, (method.one_stays or {}) if method.learn is not None else {})


def _of_method(
    merge_inputs: Sequence[MergeInput], method: Method, space: str, context: MergeContext | None
) -> list[Check]:
    what = method.name if space == "full" else f"{method.name} in {space}"
    try:
        return list(_checks(merge_inputs, method, space, what, context))
    except MbertError as error:
        return [Check(MERGED, what, math.inf, str(error))]


def _checks(
    merge_inputs: Sequence[MergeInput], method: Method, space: str, what: str, context: MergeContext | None
) -> Iterator[Check]:
    if method.one_stays is not None:
        recipe = Recipe(method.name, space, method.one_stays)
        yield Check(
            ALONE,
            what,
            *max(
                _worst_error(_dense(_merged([alone], recipe, context)), _dense(alone), _sizes([alone]))
                for alone in merge_inputs
                if alone.parts
            ),
        )
    recipe = _unlearned(method, space)
    model = _merged(merge_inputs, recipe, context)
    if not method.order_matters and len(merge_inputs) > 1:
        exact, sizes, places = _dense(model), _sizes(merge_inputs), range(len(merge_inputs))
        orders = sorted({(*places[1:], 0), tuple(reversed(places))})
        again = (_dense(_merged([merge_inputs[place] for place in order], recipe, context)) for order in orders)
        yield Check(ORDER, what, *max(_worst_error(other, exact, sizes) for other in again))
    yield Check(RELOADED, what, *_reloaded(model), tolerance=0.0)


def _weights(merge_inputs: Sequence[MergeInput]) -> dict[str, float]:
    """1, 1/2, 1/3, …, by name: all different, so that a weight given to the wrong adapter is noticed."""
    names = sorted(merge_input.name for merge_input in merge_inputs)
    return {name: 1 / place for place, name in enumerate(names, 1)}


def _merged(
    merge_inputs: Sequence[MergeInput], recipe: Recipe, context: MergeContext | None = None, lazy: bool = False
) -> Merged:
    return merge_weights(merge_inputs, replace(recipe, weights=_weights(merge_inputs)), context, lazy)


def _linear(merge_inputs: Sequence[MergeInput], method: Method) -> Check:
    model = _merged(merge_inputs, Recipe(method.name), lazy=True)
    parts, weights = {merge_input.name: _dense(merge_input) for merge_input in merge_inputs}, _weights(merge_inputs)

    def total(name: str) -> Tensor:
        return torch.stack([weights[owner] * part[name] for owner, part in parts.items() if name in part]).sum(0)

    exact = LazyMap(dict.fromkeys(name for part in parts.values() for name in part), total)
    return Check(LINEAR, method.name, *_worst_error(_dense(model), exact, _sizes(merge_inputs)))


def _lossless(merge_inputs: Sequence[MergeInput], space: str) -> Check:
    """``leave(enter(Δi)) = Δi`` at every site."""
    worst, where = 0.0, ""
    for site in _all_sites(merge_inputs):
        holders = [merge_input for merge_input in merge_inputs if site in merge_input.deltas]
        deltas = [finite_delta(holder, site) for holder in holders]
        inner, leave = SPACES[space].enter(deltas)
        for delta, inside in zip(deltas, inner, strict=True):
            back, exact = leave(inside).to(torch.float64).dense(), delta.to(torch.float64).dense()
            error = _ratio(float((back - exact).norm()), norm(delta))
            worst, where = max((worst, where), (error, site))
    return Check(LOSSLESS, space, worst, where)


def _reloaded(model: Merged) -> tuple[float, str]:
    """The largest difference between ``model`` and the same model saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged.safetensors"
        try:
            write_model(path, model)
            again = as_merged(read_model(path), str(path), "no merged model", "a merged one", "write it again")
        except MbertError as error:
            return math.inf, str(error)
    if (again.weights, again.recipe, list(again.parts)) != (model.weights, model.recipe, list(model.parts)):
        return math.inf, "its record"
    saved, loaded = _tensors(model), _tensors(again)
    if saved.keys() != loaded.keys() or any(saved[name].shape != loaded[name].shape for name in saved):
        return math.inf, "names or shapes of its tensors"
    errors = [(float((saved[name] - loaded[name]).abs().max()), name) for name in saved if saved[name].numel()]
    return max(errors, default=(0.0, ""))


def _tensors(model: Merged) -> dict[str, Tensor]:
    """All tensors of a merged model; each factor of a Delta separately."""
    tensors = dict(model.shifts)
    deltas = {**model.deltas}
    for task, specific in model.own.items():
        deltas |= {f"{task}: {site}": delta for site, delta in specific.deltas.items()}
        tensors |= {f"{task}: {name}": tensor for name, tensor in {**specific.shifts, **specific.head}.items()}
        tensors |= {
            f"{task}: {name}.{key}": tensor for name, extra in specific.extras.items() for key, tensor in extra.items()
        }
    for site, delta in deltas.items():
        tensors |= {f"{site}.{name}": tensor for name, tensor in delta.tensors().items()}
    return tensors


def _dense(model: MergeInput | Merged) -> Entries:
    """Deltas and bias and norm updates in float64, computed on access."""

    def make(name: str) -> Tensor:
        delta = model.deltas.get(name)
        return model.shifts[name].double() if delta is None else delta.to(torch.float64).dense()

    return LazyMap([*model.deltas, *model.shifts], make)


def _sizes(merge_inputs: Sequence[MergeInput]) -> dict[str, float]:
    """The norm of the largest input, by name of the entry."""
    largest: dict[str, float] = {}
    for merge_input in merge_inputs:
        norms = {site: norm(delta) for site, delta in merge_input.deltas.items()}
        norms |= {name: float(update.double().norm()) for name, update in merge_input.shifts.items()}
        largest = {name: max(largest.get(name, 0.0), norms.get(name, 0.0)) for name in {**largest, **norms}}
    return largest


def _worst_error(computed: Entries, exact: Entries, sizes: Mapping[str, float]) -> tuple[float, str]:
    """The largest relative error and the name of the entry."""
    if set(computed) != set(exact):
        return math.inf, min(set(computed) ^ set(exact))
    worst = (0.0, "")
    for name in exact:
        right = exact[name]
        error = _ratio(float((computed[name] - right).norm()), max(sizes[name], float(right.norm())))
        worst = max(worst, (error, name))
    return worst


def _ratio(error: float, size: float) -> float:
    """``error / size``; infinite if the error is not finite, or not zero while the size is."""
    if not math.isfinite(error) or (size == 0 and error > 0):
        return math.inf
    return error / size if size > 0 else 0.0
