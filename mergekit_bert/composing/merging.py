"""Merging: inputs of any kind in, one Delta per site out, by any registered method; or an ensemble, unmerged."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Delta, LowRank, compress, norm
from mergekit_bert.adapters.statistics import collect
from mergekit_bert.composing.composition import Ensemble, Merged, Own
from mergekit_bert.composing.ingredient import Ingredient, check_together, of_adapter, of_merged
from mergekit_bert.composing.method import METHODS, NEEDS, Lesson, Method, Site, chosen_weights, make_options
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.composing.spaces import SPACES, Leave
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError

Input = Adapter | Merged | Ingredient
_MEASURED = ("gram", "fisher")


@dataclass(frozen=True)
class Given:
    """What a method that learns may use: the encoder, and rows of each task, whose labels nobody reads.

    ``folder`` is where unfinished work is kept, ``show`` a progress bar.
    """

    encoder: Callable[[], Encoder]
    rows: Callable[[str], Rows]
    folder: Path | None = None
    show: bool = False


def merge(inputs: Sequence[Input], recipe: Recipe | None = None, given: Given | None = None) -> Merged | Ensemble:
    """Compose ``inputs`` by ``recipe``.

    Ranks, targets and label counts may differ; a site that an input lacks counts as a zero Delta. All sums are in
    float32 or wider. Raises CompositionError or BasisError before any work.
    """
    recipe = recipe or Recipe()
    ingredients = [ingredient(one) for one in inputs]
    check_together(ingredients)
    recipe.check(ingredients)
    if recipe.method == ENSEMBLE:
        return _ensemble(ingredients)
    method = METHODS.get(recipe.method)
    check_needs(method, ingredients, given)
    weights = chosen_weights(method, ingredients, recipe.weights)
    trace: dict[str, Any] = {}
    if method.learn is not None:
        assert given is not None
        learned = method.learn(_lesson(method, ingredients, weights, recipe, given))
        trace["learned"] = dict(learned.trace)
        weights = dict(learned.weights or weights)
        recipe_used = replace(recipe, layers={**recipe.layers, **_exact(learned.layers)})
        deltas = learned.deltas
    else:
        recipe_used, deltas = recipe, None
    sites = (
        iter(sorted(deltas.items()))
        if deltas is not None
        else merged_sites(ingredients, recipe_used, weights, measured(method, ingredients, given))
    )
    merged, lost = compressed(sites, recipe.rank)
    if lost:
        trace["lost"] = lost
    if learned_layers := {k: dict(v) for k, v in recipe_used.layers.items() if k not in recipe.layers}:
        trace["layers"] = learned_layers
    return Merged(
        method=recipe.method,
        weights=weights,
        base=ingredients[0].base,
        deltas=merged,
        shifts=merged_shifts(ingredients, weights),
        own={task: _own(own) for one in ingredients for task, own in one.own.items()},
        parts={task: part for one in ingredients for task, part in one.parts.items()},
        recipe=recipe.to_json(),
        trace=trace,
    )


def ingredient(one: Input) -> Ingredient:
    """``one`` as an input of a merge."""
    if isinstance(one, Ingredient):
        return one
    return of_merged(one) if isinstance(one, Merged) else of_adapter(one)


def _exact(layers: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Weights by site name as weights by pattern."""
    return {site.replace(".", r"\."): weights for site, weights in layers.items()}


def _ensemble(ingredients: Sequence[Ingredient]) -> Ensemble:
    experts = {}
    for one in ingredients:
        if not isinstance(one.model, Adapter):
            raise CompositionError(
                f"input {one.name!r}", "not a single adapter", "adapters, for an ensemble", "name the adapters' files"
            )
        experts[one.name] = one.model
    return Ensemble(experts)


def check_needs(method: Method, ingredients: Sequence[Ingredient], given: Given | None) -> None:
    """Raise CompositionError unless the method's needs are met, saying which and how to meet them."""
    for need in method.needs:
        if need == "basis" or given is not None:
            continue
        lacking = [one.name for one in ingredients if need not in one.statistics]
        if lacking:
            raise CompositionError(
                f"method {method.name}", f"{need} of {', '.join(lacking)} missing", NEEDS[need], "add what is missing"
            )


def measured(
    method: Method, ingredients: Sequence[Ingredient], given: Given | None
) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """The statistics that the method needs, by input, kind and site: from the files, or collected on rows."""
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for one in ingredients:
        own = dict(one.statistics)
        for kind in (need for need in method.needs if need in _MEASURED and need not in own):
            assert given is not None
            parts = [one.model.part(task) for task in one.parts]
            own[kind] = collect(kind, given.encoder(), parts, [given.rows(part.task.name) for part in parts])
        found[one.name] = own
    return found


def _lesson(
    method: Method, ingredients: Sequence[Ingredient], weights: Mapping[str, float], recipe: Recipe, given: Given
) -> Lesson:
    def start(name: str, **changes: Any) -> dict[str, Delta]:
        inner = replace(recipe, **({"method": name, "options": {}, "rank": None, "layers": {}} | changes))
        record = METHODS.get(name)
        check_needs(record, ingredients, given)
        own = chosen_weights(record, ingredients, recipe.weights)
        return dict(merged_sites(ingredients, inner, own, measured(record, ingredients, given)))

    tasks = [task for one in ingredients for task in one.parts]
    return Lesson(
        ingredients=ingredients,
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
    ingredients: Sequence[Ingredient],
    recipe: Recipe,
    weights: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> Iterator[tuple[str, Delta]]:
    """The merged Delta of every site, one at a time, in float32."""
    method = METHODS.get(recipe.method)
    see = partial(_see, method, make_options(method, recipe.options), recipe, ingredients, weights, statistics or {})
    names = sorted({site for one in ingredients for site in one.deltas})
    survey = method.survey([see(name)[0] for name in names]) if method.survey is not None else None
    for name in names:
        site, leave = see(name)
        yield name, _tidy(leave(method.merge(replace(site, survey=survey))))


def _see(
    method: Method,
    options: Any,
    recipe: Recipe,
    ingredients: Sequence[Ingredient],
    weights: Mapping[str, float],
    statistics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    name: str,
) -> tuple[Site, Leave]:
    """A site in the recipe's space, and the way back."""
    here = recipe.at(name, weights)
    counted = [
        one
        for one in ingredients
        if name in one.deltas or any(name in sites for sites in statistics.get(one.name, {}).values())
    ]
    deltas = [_wide(one.deltas[name]) if name in one.deltas else None for one in counted]
    shape = next(delta.shape for delta in deltas if delta is not None)
    known = [delta if delta is not None else _nothing(shape) for delta in deltas]
    for one, delta in zip(counted, known, strict=True):
        if delta.shape != shape:
            raise CompositionError(
                f"site {name!r}", f"{delta.shape} in {one.name!r}, {shape} in others", "one shape", "use one base"
            )
    leave: Leave
    if method.linear:
        inner, leave = known, _same
    else:
        inner, leave = SPACES[recipe.space].enter(known)
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


def _nothing(shape: tuple[int, int]) -> Delta:
    return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))


def _wide(delta: Delta) -> Delta:
    """In float32, or wider where it is; refused where it is not finite."""
    first = delta.B if isinstance(delta, LowRank) else delta.matrix
    return delta.to(torch.promote_types(first.dtype, torch.float32))


def _tidy(delta: Delta) -> Delta:
    """In float32, and no wider in factors than the matrix is."""
    if isinstance(delta, LowRank) and delta.rank > min(delta.shape):
        delta = compress(delta, min(delta.shape))[0]
    return delta.to(torch.float32)


def compressed(sites: Iterator[tuple[str, Delta]], rank: int | None) -> tuple[dict[str, Delta], dict[str, Any]]:
    """The Deltas at no more than ``rank``, and the share of ``‖Δ‖²`` lost at each site and in all."""
    if rank is None:
        return dict(sites), {}
    kept: dict[str, Delta] = {}
    lost: dict[str, float] = {}
    gone = whole = 0.0
    for name, delta in sites:
        if rank > min(delta.shape):
            raise CompositionError(
                f"--rank {rank}", f"site {name!r} is {delta.shape[0]} × {delta.shape[1]}",
                f"at most {min(delta.shape)}", "choose a smaller --rank"
            )  # fmt: skip
        energy = norm(delta) ** 2
        small = isinstance(delta, LowRank) and delta.rank <= rank
        kept[name], lost[name] = (delta, 0.0) if small else compress(delta, rank)
        whole, gone = whole + energy, gone + energy * lost[name]
    return kept, {"rank": rank, "in_all": gone / whole if whole else 0.0, "sites": lost}


def _own(own: Own) -> Own:
    """What is not merged: nothing that one task's head alone reads can be shared, so it stays as it was trained."""
    return Own(
        own.head,
        {site: _wide(delta).to(torch.float32) for site, delta in own.deltas.items()},
        {name: shift.float() for name, shift in own.shifts.items()},
    )


def merged_shifts(ingredients: Sequence[Ingredient], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Changes of biases and norms add up linearly, with the weights of their adapters."""
    total: dict[str, Tensor] = {}
    for one in ingredients:
        for name in one.shifts:
            part = weights[one.name] * one.shifts[name].to(torch.float32)
            total[name] = total[name] + part if name in total else part
    return total


def with_inputs(merged: Merged, inputs: Sequence[Input]) -> Merged:
    """``merged`` with its inputs kept, which must be adapters."""
    kept = {}
    for one in map(ingredient, inputs):
        if not isinstance(one.model, Adapter):
            raise CompositionError(
                "--keep-inputs", f"{one.name!r} is not a single adapter", "adapters alone", "merge their files"
            )
        kept[one.name] = one.model
    return replace(merged, kept=kept)


def change(merged: Merged, add: Sequence[Input], remove: Sequence[str]) -> list[Ingredient]:
    """The inputs of a merge that kept them, with some added and some removed; raises CompositionError."""
    if not merged.kept:
        raise CompositionError(
            "--add or --remove", "a file that did not keep its inputs", "one merged with --keep-inputs", "merge again"
        )
    for task in remove:
        if task not in merged.kept:
            raise CompositionError(
                "--remove", f"{task!r}", f"one of {', '.join(merged.kept)}", "name a task that is in the file"
            )
    left = [one for task, one in merged.kept.items() if task not in remove]
    return [ingredient(one) for one in (*left, *add)]


def parse_weights(text: str) -> dict[str, float]:
    """``"sst=1,para=-0.5"`` as weights by name; raises CompositionError."""
    weights = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = (word.strip() for word in part.rpartition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or name in weights or not name:
            raise CompositionError(
                "--weights", f"{part!r}", "name=number, separated by commas, each name once", "correct it"
            )
        weights[name] = number
    return weights
