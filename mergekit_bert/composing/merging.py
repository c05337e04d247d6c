"""Merging: combines the Deltas of all inputs site by site, by any registered method; or makes an ensemble."""

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
    """The encoder and unlabelled rows of each task, for methods that need them.

    ``folder`` is where methods that learn keep checkpoints; ``show``: show a progress bar.
    """

    encoder: Callable[[], Encoder]
    rows: Callable[[str], Rows]
    folder: Path | None = None
    show: bool = False


def merge(
    inputs: Sequence[Input], recipe: Recipe | None = None, context: MergeContext | None = None, lazy: bool = False
) -> Merged | Ensemble:
    """Compose ``inputs`` by ``recipe``: merged, or as an ensemble.

    Ranks, targets and label counts may differ; a site that an input lacks counts as a zero Delta. All sums are in
    float32 or wider. ``lazy``: each site is merged on demand and not kept, so that a model larger than the memory can
    be written. Raises CompositionError or BasisError before any work.
    """
    merge_inputs, recipe = _checked(inputs, recipe or Recipe(), context)
    return _ensemble(merge_inputs) if recipe.method == ENSEMBLE else _merged(merge_inputs, recipe, context, lazy)


def merge_weights(
    inputs: Sequence[Input], recipe: Recipe, context: MergeContext | None = None, lazy: bool = False
) -> Merged:
    """As :func:`merge`, by a recipe that names a merge method; raises UnknownNameError for the ensemble too."""
    return _merged(*_checked(inputs, recipe, context), context, lazy)


def _checked(inputs: Sequence[Input], recipe: Recipe, context: MergeContext | None) -> tuple[list[MergeInput], Recipe]:
    """The merge inputs, checked, and the recipe with its method filled in."""
    merge_inputs = merge_inputs_of(inputs)
    check_together(merge_inputs)
    recipe, _ = with_method(recipe, merge_inputs, context is not None)
    recipe.check(merge_inputs)
    for merge_input in merge_inputs:
        if not merge_input.lazy:  # lazily read Deltas are checked when they are read
            for site in merge_input.deltas:
                finite_delta(merge_input, site)
    return merge_inputs, recipe


def _merged(merge_inputs: Sequence[MergeInput], recipe: Recipe, context: MergeContext | None, lazy: bool) -> Merged:
    method = METHODS.get(recipe.method)
    check_needs(method, merge_inputs, context)
    weights = chosen_weights(method, merge_inputs, recipe.weights)
    trace: dict[str, Any] = {}
    if method.learn is not None:
        assert context is not None
        learned = method.learn(_learning_context(method, merge_inputs, weights, recipe, context))
        trace["learned"] = dict(learned.trace)
        weights = dict(learned.weights or weights)
        recipe_used = replace(recipe, layers={**recipe.layers, **_exact(learned.layers)})
        deltas = learned.deltas
    else:
        recipe_used, deltas = recipe, None
    sites = (
        dict(sorted(deltas.items()))
        if deltas is not None
        else merged_sites(merge_inputs, recipe_used, weights, measured(method, merge_inputs, context))
    )
    shifts, specific = (
        merged_shifts(merge_inputs, weights),
        {task: o for merge_input in merge_inputs for task, o in merge_input.own.items()},
    )
    if not lazy:
        shifts = dict(shifts)
    merged, lost = (sites, {}) if lazy and recipe.rank is None else compressed(sites, recipe.rank)
    if recipe.private:
        if lazy:
            merged = LazyMap(merged, lru_cache(maxsize=1)(merged.__getitem__))  # it is read once for every task
        specific = residuals(merge_inputs, merged, shifts, recipe.private)
    if not lazy:
        specific = {task: merge_input.read() for task, merge_input in specific.items()}
    if lost:
        trace["lost"] = lost
    if traces := {merge_input.name: dict(merge_input.trace) for merge_input in merge_inputs if merge_input.trace}:
        trace["inputs"] = traces
    if learned_layers := {k: dict(v) for k, v in recipe_used.layers.items() if k not in recipe.layers}:
        trace["layers"] = learned_layers
    return Merged(
        method=recipe.method,
        weights=weights,
        base=merge_inputs[0].base,
        deltas=merged,
        shifts=shifts,
        own=specific,
        parts={task: part for merge_input in merge_inputs for task, part in merge_input.parts.items()},
        bodies={name: part for merge_input in merge_inputs for name, part in merge_input.bodies.items()},
        recipe=replace(recipe, inputs=()).to_json(),  # `parts` identifies the inputs, wherever their files were
        trace=trace,
    )


def merge_inputs_of(inputs: Sequence[Input]) -> list[MergeInput]:
    """Models and merge inputs as merge inputs."""
    return [merge_input for model in inputs for merge_input in inputs_of(model)]


def _exact(layers: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Weights by site name as weights by pattern, with dots escaped."""
    return {site.replace(".", r"\."): weights for site, weights in layers.items()}


def _ensemble(merge_inputs: Sequence[MergeInput]) -> Ensemble:
    experts = {}
    for merge_input in merge_inputs:
        if merge_input.adapter is None:
            raise CompositionError(
                f"input {merge_input.name!r}",
                "not a single adapter",
                "adapters, for an ensemble",
                "name the adapters' files",
            )
        experts[merge_input.name] = merge_input.adapter
    return Ensemble(experts)


def check_needs(method: Method, merge_inputs: Sequence[MergeInput], context: MergeContext | None) -> None:
    """Raise CompositionError unless the method's needs are met, naming those that are not."""
    for need, names in _lacking(method, merge_inputs).items():
        if context is None:
            raise CompositionError(
                f"method {method.name}", f"{need} of {', '.join(names)} missing", NEEDS[need], "add what is missing"
            )
        if bodies := [
            merge_input.name
            for merge_input in merge_inputs
            if merge_input.name in names and need in _MEASURED and not merge_input.parts
        ]:
            raise CompositionError(
                f"method {method.name}",
                f"{need} of {', '.join(bodies)} missing, and it has no task to measure it on",
                "adapters with a task",
                "choose another method",
            )


def reads_rows(recipe: Recipe, merge_inputs: Sequence[MergeInput]) -> bool:
    """Whether a merge of ``merge_inputs`` by ``recipe``, which names its method, needs rows."""
    return recipe.method != ENSEMBLE and bool(_lacking(METHODS.get(recipe.method), merge_inputs))


def _lacking(method: Method, merge_inputs: Sequence[MergeInput]) -> dict[str, list[str]]:
    """The needs of the method that must be measured on rows, each with the inputs that lack it."""
    lacking = {
        need: [merge_input.name for merge_input in merge_inputs if need not in merge_input.statistics]
        for need in method.needs
    }
    return {need: names for need, names in lacking.items() if names and need != "basis"}


def measured(
    method: Method, merge_inputs: Sequence[MergeInput], context: MergeContext | None
) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """The statistics that the method needs, by input, statistic and site: from the files, or measured on rows."""
    statistics: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for merge_input in merge_inputs:
        by_name = {name: sites for name, sites in merge_input.statistics.items() if name in method.needs}
        for name in (need for need in method.needs if need in _MEASURED and need not in by_name):
            assert context is not None
            parts = [merge_input.part(task) for task in merge_input.parts]
            by_name[name] = collect(name, context.encoder(), parts, [context.rows(part.task.name) for part in parts])
        statistics[merge_input.name] = by_name
    return statistics


def with_statistics(
    method: Method, merge_inputs: Sequence[MergeInput], context: MergeContext | None
) -> list[MergeInput]:
    """The inputs with the statistics that the method measures on rows, so that they are not measured again."""
    check_needs(method, merge_inputs, context)
    statistics = measured(method, merge_inputs, context)
    return [
        replace(merge_input, statistics={**merge_input.statistics, **statistics[merge_input.name]})
        for merge_input in merge_inputs
    ]


def _learning_context(
    method: Method,
    merge_inputs: Sequence[MergeInput],
    weights: Mapping[str, float],
    recipe: Recipe,
    context: MergeContext,
) -> LearningContext:
    def start(name: str, **changes: Any) -> dict[str, Delta]:
        inner = replace(recipe, **({"method": name, "options": {}, "rank": None, "layers": {}} | changes))
        record = METHODS.get(name)
        check_needs(record, merge_inputs, context)
        return dict(merged_sites(merge_inputs, inner, weights, measured(record, merge_inputs, context)))

    tasks = [task for merge_input in merge_inputs for task in merge_input.parts]
    return LearningContext(
        merge_inputs=merge_inputs,
        weights=weights,
        options=make_options(method, recipe.options),
        encoder=context.encoder(),
        rows={task: replace(context.rows(task), labels=None) for task in tasks},
        rank=recipe.rank,
        seed=recipe.seed,
        merge=start,
        folder=context.folder,
        show=context.show,
    )


def merged_sites(
    merge_inputs: Sequence[MergeInput],
    recipe: Recipe,
    weights: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> Mapping[str, Delta]:
    """The merged Delta of every site in float32, computed on every access."""
    method = METHODS.get(recipe.method)
    see = partial(_see, method, make_options(method, recipe.options), recipe, merge_inputs, weights, statistics or {})
    names = sorted({site for merge_input in merge_inputs for site in merge_input.deltas})
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
    """A site in the recipe's space, and the function that transforms a Delta back."""
    here = recipe.at(name, weights)
    counted = [merge_input for merge_input in merge_inputs if name in merge_input.deltas]
    shapes: set[tuple[int, int]] = set()

    def read(merge_input: MergeInput) -> Delta:
        delta = finite_delta(merge_input, name)
        if shapes - {delta.shape}:
            raise CompositionError(
                f"site {name!r}",
                f"{delta.shape} in {merge_input.name!r}, {min(shapes)} in others",
                "one shape",
                "use one base",
            )
        shapes.add(delta.shape)
        return delta

    inner: Sequence[Delta]
    leave: Leave
    if method.linear:  # it needs one Delta at a time
        inner, leave = LazyList(counted, read), _same
    else:
        known = {merge_input.name: read(merge_input) for merge_input in counted}
        counted = [
            merge_input
            for merge_input in merge_inputs
            if merge_input.name in known
            or any(name in sites for sites in statistics.get(merge_input.name, {}).values())
        ]
        inner, leave = SPACES[recipe.space].enter(
            [known.get(merge_input.name, zero(min(shapes))) for merge_input in counted]
        )
    site = Site(
        name=name,
        names=[merge_input.name for merge_input in counted],
        deltas=inner,
        weights=[here[merge_input.name] for merge_input in counted],
        options=options,
        seed=recipe.seed,
        statistics=[
            {
                statistic: sites[name]
                for statistic, sites in statistics.get(merge_input.name, {}).items()
                if name in sites
            }
            for merge_input in counted
        ],
    )
    return site, leave


def _same(delta: Delta) -> Delta:
    return delta


def finite_delta(merge_input: MergeInput, site: str) -> Delta:
    """The Delta of an input at ``site``, in float32 or wider; raises CompositionError if it is not finite."""
    delta = _wide(merge_input.deltas[site])
    for tensor in delta.tensors().values():
        if not finite(tensor):
            raise CompositionError(
                f"site {site!r} of {merge_input.name!r}", NOT_FINITE, "finite values", "train or export it again"
            )
    return delta


def _wide(delta: Delta) -> Delta:
    """The Delta in float32, or in its own dtype if that is wider."""
    return delta.to(torch.promote_types(delta.dtype, torch.float32))


def _tidy(delta: Delta) -> Delta:
    """The Delta in float32, its factors compressed without loss if their rank exceeds the matrix size."""
    return narrow(delta).to(torch.float32)


def compressed(sites: Mapping[str, Delta], rank: int | None) -> tuple[Mapping[str, Delta], dict[str, Any]]:
    """The Deltas compressed to at most ``rank``, and the share of ``‖Δ‖²`` lost at each site and in total."""
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
    """The weighted sums of the inputs' bias and norm updates."""

    def add_one(name: str) -> Tensor:
        total: Tensor | None = None
        for merge_input in merge_inputs:
            if name in merge_input.shifts:
                shift, weight = merge_input.shifts[name].to(torch.float32), weights[merge_input.name]
                total = weight * shift if total is None else total.add_(shift, alpha=weight)
        assert total is not None
        return total

    return LazyMap([name for merge_input in merge_inputs for name in merge_input.shifts], add_one)


def kept_inputs(inputs: Sequence[Input]) -> dict[str, Adapter]:
    """The inputs by name, to be stored in the merged model; raises CompositionError unless they are adapters."""
    kept = {}
    for merge_input in merge_inputs_of(inputs):
        if merge_input.adapter is None:
            raise CompositionError(
                "`keep_inputs`", f"{merge_input.name!r} is not a single adapter", "only adapters", "merge adapter files"
            )
        kept[merge_input.name] = merge_input.adapter
    return kept


def change(merged: Merged, add: Sequence[Input], remove: Sequence[str]) -> list[MergeInput]:
    """The inputs stored in a merged model, with some added and some removed; raises CompositionError."""
    if not merged.kept:
        raise CompositionError(
            "`add` or `remove`", "a file without its inputs", "one merged with `keep_inputs`", "merge again"
        )
    for task in remove:
        if task not in merged.kept:
            raise CompositionError(
                "`remove`", f"{task!r}", f"one of {', '.join(merged.kept)}", "name a task that is in the file"
            )
    left = [adapter for task, adapter in merged.kept.items() if task not in remove]
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
