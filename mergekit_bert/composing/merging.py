"""Merging: inputs of any kind in, one Delta per site out, by any registered method; or an ensemble, unmerged."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Delta, compress, narrow, norm, zero
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.composing.lazy import LazyList, LazyMap
from mergekit_bert.composing.merge_input import MergeInput, check_together, inputs_of
from mergekit_bert.composing.method import METHODS, NEEDS, LearningContext, Method, Site, chosen_weights, make_options
from mergekit_bert.composing.private import residuals
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.composing.recommendation import with_method
from mergekit_bert.composing.spaces import SPACES, Leave
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.models.composition import Ensemble, Merged
from mergekit_bert.tensorfile import NOT_FINITE, finite

Input = Adapter | Merged | Ensemble | MergeInput
_MEASURED = ("gram", "fisher")


@dataclass(frozen=True)
class MergeContext:
    """What a method that learns may use: the encoder, and rows of each task, whose labels nobody reads.

    ``folder`` is where unfinished work is kept, ``show`` a progress bar.
    """

    encoder: Callable[[], Encoder]
    rows: Callable[[str], Rows]
    folder: Path | None = None
    show: bool = False


def merge(
    inputs: Sequence[Input], recipe: Recipe | None = None, given: MergeContext | None = None, lazy: bool = False
) -> Merged | Ensemble:
    """Compose ``inputs`` by ``recipe``: merged, or as an ensemble.

    Ranks, targets and label counts may differ; a site that an input lacks counts as a zero Delta. All sums are in
    float32 or wider. ``lazy``: a site is merged when it is asked for and not kept, so that a model larger than the
    memory can be written. Raises CompositionError or BasisError before any work.
    """
    merge_inputs, recipe = _checked(inputs, recipe or Recipe(), given)
    return _ensemble(merge_inputs) if recipe.method == ENSEMBLE else _merged(merge_inputs, recipe, given, lazy)


def merge_weights(
    inputs: Sequence[Input], recipe: Recipe, given: MergeContext | None = None, lazy: bool = False
) -> Merged:
    """As :func:`merge`, by a recipe that names a merge method; raises UnknownNameError for the ensemble too."""
    return _merged(*_checked(inputs, recipe, given), given, lazy)


def _checked(inputs: Sequence[Input], recipe: Recipe, given: MergeContext | None) -> tuple[list[MergeInput], Recipe]:
    """The inputs, which fit together and the recipe, and the recipe with its method."""
    merge_inputs = merge_inputs_of(inputs)
    check_together(merge_inputs)
    recipe, _ = with_method(recipe, merge_inputs, given is not None)
    recipe.check(merge_inputs)
    for one in merge_inputs:
        if not one.lazy:  # others are read, and checked, one by one
            for site in one.deltas:
                finite_delta(one, site)
    return merge_inputs, recipe


def _merged(merge_inputs: Sequence[MergeInput], recipe: Recipe, given: MergeContext | None, lazy: bool) -> Merged:
    method = METHODS.get(recipe.method)
    check_needs(method, merge_inputs, given)
    weights = chosen_weights(method, merge_inputs, recipe.weights)
    trace: dict[str, Any] = {}
    if method.learn is not None:
        assert given is not None
        learned = method.learn(_learning_context(method, merge_inputs, weights, recipe, given))
        trace["learned"] = dict(learned.trace)
        weights = dict(learned.weights or weights)
        recipe_used = replace(recipe, layers={**recipe.layers, **_exact(learned.layers)})
        deltas = learned.deltas
    else:
        recipe_used, deltas = recipe, None
    sites = (
        dict(sorted(deltas.items()))
        if deltas is not None
        else merged_sites(merge_inputs, recipe_used, weights, measured(method, merge_inputs, given))
    )
    shifts, own = merged_shifts(merge_inputs, weights), {task: o for one in merge_inputs for task, o in one.own.items()}
    if not lazy:
        shifts = dict(shifts)
    merged, lost = (sites, {}) if lazy and recipe.rank is None else compressed(sites, recipe.rank)
    if recipe.private:
        if lazy:
            merged = LazyMap(merged, lru_cache(maxsize=1)(merged.__getitem__))  # every task asks for it again
        own = residuals(merge_inputs, merged, shifts, recipe.private)
    if not lazy:
        own = {task: one.read() for task, one in own.items()}
    if lost:
        trace["lost"] = lost
    if traces := {one.name: dict(one.trace) for one in merge_inputs if one.trace}:
        trace["inputs"] = traces
    if learned_layers := {k: dict(v) for k, v in recipe_used.layers.items() if k not in recipe.layers}:
        trace["layers"] = learned_layers
    return Merged(
        method=recipe.method,
        weights=weights,
        base=merge_inputs[0].base,
        deltas=merged,
        shifts=shifts,
        own=own,
        parts={task: part for one in merge_inputs for task, part in one.parts.items()},
        bodies={name: part for one in merge_inputs for name, part in one.bodies.items()},
        recipe=replace(recipe, inputs=()).to_json(),  # what they were is in the parts, wherever they lay
        trace=trace,
    )


def merge_inputs_of(inputs: Sequence[Input]) -> list[MergeInput]:
    """All that models, and inputs that were read, give to a merge."""
    return [merge_input for one in inputs for merge_input in inputs_of(one)]


def _exact(layers: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Weights by site name as weights by pattern."""
    return {site.replace(".", r"\."): weights for site, weights in layers.items()}


def _ensemble(merge_inputs: Sequence[MergeInput]) -> Ensemble:
    experts = {}
    for one in merge_inputs:
        if one.adapter is None:
            raise CompositionError(
                f"input {one.name!r}", "not a single adapter", "adapters, for an ensemble", "name the adapters' files"
            )
        experts[one.name] = one.adapter
    return Ensemble(experts)


def check_needs(method: Method, merge_inputs: Sequence[MergeInput], given: MergeContext | None) -> None:
    """Raise CompositionError unless the method's needs are met, saying which and how to meet them."""
    for need, names in _lacking(method, merge_inputs).items():
        if given is None:
            raise CompositionError(
                f"method {method.name}", f"{need} of {', '.join(names)} missing", NEEDS[need], "add what is missing"
            )
        if bodies := [one.name for one in merge_inputs if one.name in names and need in _MEASURED and not one.parts]:
            raise CompositionError(
                f"method {method.name}",
                f"{need} of {', '.join(bodies)} missing, which has no task to measure it on",
                "adapters with a task",
                "choose another method",
            )


def reads_rows(recipe: Recipe, merge_inputs: Sequence[MergeInput]) -> bool:
    """Whether a merge of ``merge_inputs`` by ``recipe``, which names its method, takes anything from rows."""
    return recipe.method != ENSEMBLE and bool(_lacking(METHODS.get(recipe.method), merge_inputs))


def _lacking(method: Method, merge_inputs: Sequence[MergeInput]) -> dict[str, list[str]]:
    """What the method has to get from rows, and the inputs whose files do not hold it."""
    found = {need: [one.name for one in merge_inputs if need not in one.statistics] for need in method.needs}
    return {need: names for need, names in found.items() if names and need != "basis"}


def measured(
    method: Method, merge_inputs: Sequence[MergeInput], given: MergeContext | None
) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """The statistics that the method needs, by input, kind and site: from the files, or collected on rows."""
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for one in merge_inputs:
        own = {kind: sites for kind, sites in one.statistics.items() if kind in method.needs}
        for kind in (need for need in method.needs if need in _MEASURED and need not in own):
            assert given is not None
            parts = [one.part(task) for task in one.parts]
            own[kind] = collect(kind, given.encoder(), parts, [given.rows(part.task.name) for part in parts])
        found[one.name] = own
    return found


def with_statistics(method: Method, merge_inputs: Sequence[MergeInput], given: MergeContext | None) -> list[MergeInput]:
    """The inputs holding what the method measures on rows, so that merges of them do not measure it again."""
    check_needs(method, merge_inputs, given)
    found = measured(method, merge_inputs, given)
    return [replace(one, statistics={**one.statistics, **found[one.name]}) for one in merge_inputs]


def _learning_context(
    method: Method,
    merge_inputs: Sequence[MergeInput],
    weights: Mapping[str, float],
    recipe: Recipe,
    given: MergeContext,
) -> LearningContext:
    def start(name: str, **changes: Any) -> dict[str, Delta]:
        inner = replace(recipe, **({"method": name, "options": {}, "rank": None, "layers": {}} | changes))
        record = METHODS.get(name)
        check_needs(record, merge_inputs, given)
        return dict(merged_sites(merge_inputs, inner, weights, measured(record, merge_inputs, given)))

    tasks = [task for one in merge_inputs for task in one.parts]
    return LearningContext(
        merge_inputs=merge_inputs,
        weights=weights,
        options=make_options(method, recipe.options),
        encoder=given.encoder(),
        rows={task: replace(given.rows(task), labels=None) for task in tasks},
        rank=recipe.rank,
        seed=recipe.seed,
        merge=start,
        folder=given.folder,
        show=given.show,
    )


def merged_sites(
    merge_inputs: Sequence[MergeInput],
    recipe: Recipe,
    weights: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> Mapping[str, Delta]:
    """The merged Delta of every site in float32, merged anew when it is asked for."""
    method = METHODS.get(recipe.method)
    see = partial(_see, method, make_options(method, recipe.options), recipe, merge_inputs, weights, statistics or {})
    names = sorted({site for one in merge_inputs for site in one.deltas})
    survey = method.survey(LazyList(names, lambda name: see(name)[0])) if method.survey is not None else None

    def merge_one(name: str) -> Delta:
        site, leave = see(name)
        return _tidy(leave(method.merge(replace(site, survey=survey))))

    return LazyMap(names, merge_one)


def _see(
    method: Method,
    options: Any,
    recipe: Recipe,
    merge_inputs: Sequence[MergeInput],
    weights: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    name: str,
) -> tuple[Site, Leave]:
    """A site in the recipe's space, and the way back."""
    here = recipe.at(name, weights)
    counted = [one for one in merge_inputs if name in one.deltas]
    shapes: set[tuple[int, int]] = set()

    def read(one: MergeInput) -> Delta:
        delta = finite_delta(one, name)
        if shapes - {delta.shape}:
            raise CompositionError(
                f"site {name!r}", f"{delta.shape} in {one.name!r}, {min(shapes)} in others", "one shape", "use one base"
            )
        shapes.add(delta.shape)
        return delta

    inner: Sequence[Delta]
    leave: Leave
    if method.linear:  # it needs one Delta at a time
        inner, leave = LazyList(counted, read), _same
    else:
        known = {one.name: read(one) for one in counted}
        counted = [
            one
            for one in merge_inputs
            if one.name in known or any(name in sites for sites in statistics.get(one.name, {}).values())
        ]
        inner, leave = SPACES[recipe.space].enter([known.get(one.name, zero(min(shapes))) for one in counted])
    site = Site(
        name=name,
        names=[one.name for one in counted],
        deltas=inner,
        weights=[here[one.name] for one in counted],
        options=options,
        seed=recipe.seed,
        statistics=[
            {kind: sites[name] for kind, sites in statistics.get(one.name, {}).items() if name in sites}
            for one in counted
        ],
    )
    return site, leave


def _same(delta: Delta) -> Delta:
    return delta


def finite_delta(one: MergeInput, site: str) -> Delta:
    """The Delta of ``one`` at ``site``; CompositionError where it is not finite."""
    delta = _wide(one.deltas[site])
    for tensor in delta.tensors().values():
        if not finite(tensor):
            raise CompositionError(
                f"site {site!r} of {one.name!r}", NOT_FINITE, "finite values", "train or export it again"
            )
    return delta


def _wide(delta: Delta) -> Delta:
    """In float32, or wider where it is."""
    return delta.to(torch.promote_types(delta.dtype, torch.float32))


def _tidy(delta: Delta) -> Delta:
    """In float32, and no wider in factors than the matrix is."""
    return narrow(delta).to(torch.float32)


def compressed(sites: Mapping[str, Delta], rank: int | None) -> tuple[Mapping[str, Delta], dict[str, Any]]:
    """The Deltas at no more than ``rank``, and the share of ``‖Δ‖²`` lost at each site and in all."""
    if rank is None:
        return dict(sites), {}
    kept: dict[str, Delta] = {}
    lost: dict[str, float] = {}
    gone = whole = 0.0
    for name, delta in sites.items():
        if rank > min(delta.shape):
            raise CompositionError(
                f"`rank={rank}`", f"site {name!r} is {delta.shape[0]} × {delta.shape[1]}",
                f"at most {min(delta.shape)}", "choose a smaller `rank`"
            )  # fmt: skip
        small = delta.rank is not None and delta.rank <= rank
        kept[name], lost[name] = (delta, 0.0) if small else compress(delta, rank)
        energy = norm(kept[name]) ** 2 / (1 - lost[name])
        whole, gone = whole + energy, gone + energy * lost[name]
    return kept, {"rank": rank, "in_all": gone / whole if whole else 0.0, "sites": lost}


def merged_shifts(merge_inputs: Sequence[MergeInput], weights: Mapping[str, float]) -> Tensors:
    """Changes of biases and norms add up linearly, with the weights of their adapters."""

    def add_one(name: str) -> Tensor:
        total: Tensor | None = None
        for one in merge_inputs:
            if name in one.shifts:
                shift, weight = one.shifts[name].to(torch.float32), weights[one.name]
                total = weight * shift if total is None else total.add_(shift, alpha=weight)
        assert total is not None
        return total

    return LazyMap([name for one in merge_inputs for name in one.shifts], add_one)


def kept_inputs(inputs: Sequence[Input]) -> dict[str, Adapter]:
    """The inputs by name, to be kept in a merge: they must be adapters."""
    kept = {}
    for one in merge_inputs_of(inputs):
        if one.adapter is None:
            raise CompositionError(
                "`keep_inputs`", f"{one.name!r} is not a single adapter", "adapters alone", "merge their files"
            )
        kept[one.name] = one.adapter
    return kept


def change(merged: Merged, add: Sequence[Input], remove: Sequence[str]) -> list[MergeInput]:
    """The inputs of a merge that kept them, with some added and some removed; raises CompositionError."""
    if not merged.kept:
        raise CompositionError(
            "`add` or `remove`", "a file that did not keep its inputs", "one merged with `keep_inputs`", "merge again"
        )
    for task in remove:
        if task not in merged.kept:
            raise CompositionError(
                "`remove`", f"{task!r}", f"one of {', '.join(merged.kept)}", "name a task that is in the file"
            )
    left = [one for task, one in merged.kept.items() if task not in remove]
    return merge_inputs_of([*left, *add])


def parse_weights(text: str) -> dict[str, float]:
    """``"sst=1,para=-0.5"`` as weights by name; raises CompositionError."""
    weights = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or name in weights or not name:
            raise CompositionError(
                "`weights`", f"{part!r}", "name=number, separated by commas, each name once", "correct it"
            )
        weights[name] = number
    return weights
