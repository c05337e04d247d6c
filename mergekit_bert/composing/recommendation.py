"""The recommended merge method for the inputs and rows at hand, and the reason. The evidence is in docs/evidence.md."""

import dataclasses
from collections.abc import Sequence

from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.recipe import Recipe


def with_method(
    recipe: Recipe, merge_inputs: Sequence[MergeInput], rows: bool, *, synthetic: bool = False, searched: bool = False
) -> tuple[Recipe, str]:
    """``recipe``, with the recommended method if it names none, and the reason ("" if it names one)."""
    if recipe.method:
        return recipe, ""
    method, reason = recommend(merge_inputs, rows, synthetic=synthetic, searched=searched)
    return dataclasses.replace(recipe, method=method), reason


def recommend(
    merge_inputs: Sequence[MergeInput], rows: bool, *, synthetic: bool = False, searched: bool = False
) -> tuple[str, str]:
    """(method, reason) for a merge of ``merge_inputs``; ``searched`` if its weights will be searched.

    ``rows`` is whether there are unlabelled rows, ``synthetic`` whether these are generated.
    """
    if any(merge_input.lazy for merge_input in merge_inputs):
        return (
            "task_arithmetic",
            "there are whole checkpoints among the inputs, and only a sum is fast for them",
        )
    orthogonal = _on_one_basis(merge_inputs)
    if rows and not searched and not synthetic:
        return (
            "distill",
            "there are unlabelled rows, and fitting the merge to the experts' answers on rows keeps the most accuracy",
        )
    if rows and not searched and orthogonal:
        return (
            "distill",
            "for adapters on one orthogonal basis, fitting to synthetic texts keeps more accuracy than any other merge "
            "without data",
        )
    if orthogonal and all("gram" in merge_input.statistics for merge_input in merge_inputs):
        return (
            "regmean",
            "all files contain Gram matrices; on one orthogonal basis it keeps the most accuracy of the fast methods",
        )
    if searched:
        return (
            "pico",
            "a search needs a method that does not learn, and this keeps the most accuracy of those that need no rows",
        )
    if rows:
        return (
            "pico",
            "without a common orthogonal basis, fitting to synthetic texts takes longer and keeps no more accuracy",
        )
    return (
        "pico",
        "there are no rows, and it keeps the most accuracy of the methods that need none; `method=distill` with "
        "`data=synthetic` keeps more but takes minutes, and `method=ensemble` keeps everything",
    )


def _on_one_basis(merge_inputs: Sequence[MergeInput]) -> bool:
    """Whether all inputs use rows of the same orthogonal basis."""
    seeds = {None if merge_input.basis is None else merge_input.basis.seed for merge_input in merge_inputs}
    return len(seeds) == 1 and None not in seeds
