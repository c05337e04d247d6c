"""The recommended method for what is given: what the evidence of docs/evidence.md says, and why."""

import dataclasses
from collections.abc import Sequence

from mergekit_bert.composing.budget import ensemble_size, rank_within
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.errors import CompositionError

_LARGEST_SIZE = 1e9


def with_method(
    recipe: Recipe,
    merge_inputs: Sequence[MergeInput],
    rows: bool,
    *,
    invented: bool = False,
    searched: bool = False,
    calibrated: bool = False,
    size: float | None = None,
) -> tuple[Recipe, str]:
    """``recipe`` with the recommended method where it names none, and the reason ("" where it does).

    Within ``size`` MiB: the ensemble where it fits and nothing is asked that only a merge has, else the largest rank
    that fits. Raises CompositionError for what no rank can hold to a size.
    """
    if size is not None:
        if not 0 < size <= _LARGEST_SIZE:
            raise CompositionError(
                "`size`", f"{size}", f"a positive number of MiB up to {_LARGEST_SIZE:g}", "correct it"
            )
        for name, given in (("`rank`", recipe.rank), ("`private`", recipe.private)):
            refuse_beside_size(name, given)
        refuse_beside_size(f"`method={ENSEMBLE}`", recipe.method == ENSEMBLE)
        told = recipe.method or recipe.weights or recipe.layers or recipe.options or recipe.space != "full"
        if not (told or searched or calibrated) and ensemble_size(merge_inputs) <= size:
            reason = "all inputs fit side by side, where they lose nothing; `rank` makes one merged model instead"
            return dataclasses.replace(recipe, method=ENSEMBLE), reason
        recipe = dataclasses.replace(recipe, rank=rank_within(merge_inputs, size))
    if recipe.method:
        return recipe, ""
    method, reason = recommend(merge_inputs, rows, invented=invented, searched=searched)
    return dataclasses.replace(recipe, method=method), reason


def refuse_beside_size(name: str, given: object) -> None:
    """Raise CompositionError for an option that decides the size itself."""
    if given:
        raise CompositionError("`size`", f"{name} as well", "one of the two", f"drop {name} or `size`")


def recommend(
    merge_inputs: Sequence[MergeInput], rows: bool, *, invented: bool = False, searched: bool = False
) -> tuple[str, str]:
    """(method, reason) for a merge of ``merge_inputs``, perhaps to be searched.

    ``rows`` says whether there are unlabelled rows, ``invented`` whether these are made up.
    """
    if not all(isinstance(one.deltas, dict) for one in merge_inputs):
        return (
            "task_arithmetic",
            "whole checkpoints are among the inputs, and a sum is the one merge that is quick there",
        )
    apart = _on_one_basis(merge_inputs)
    if rows and not searched and not invented:
        return (
            "distill",
            "there are rows without labels, and what is fitted to the experts' answers on rows keeps most of them",
        )
    if rows and not searched and apart:
        return (
            "distill",
            "fitted to texts that are made up, a merge of adapters on one orthogonal basis keeps more than any other "
            "without data",
        )
    if apart and all("gram" in one.statistics for one in merge_inputs):
        return (
            "regmean",
            "all files hold Gram matrices, and of the quick methods it keeps most on one orthogonal basis",
        )
    if searched:
        return "pico", "a search is for methods that do not learn, and of those that measure nothing it keeps most"
    if rows:
        return (
            "pico",
            "without one orthogonal basis, fitting to texts that are made up keeps no more than this does at once",
        )
    return (
        "pico",
        "no rows were given, and of the methods that need none it keeps most; more is kept by texts that are made up "
        "(`method=distill`, `data=invented`), in minutes, or by all adapters side by side (`method=ensemble`)",
    )


def _on_one_basis(merge_inputs: Sequence[MergeInput]) -> bool:
    """Whether all hold rows of the same orthogonal basis."""
    seeds = {None if one.basis is None else one.basis.seed for one in merge_inputs}
    return len(seeds) == 1 and None not in seeds
