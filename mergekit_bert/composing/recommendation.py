"""The recommended method for what is given: what the evidence of docs/evidence.md says, and why."""

from collections.abc import Sequence

from mergekit_bert.composing.ingredient import Ingredient


def recommend(
    ingredients: Sequence[Ingredient], rows: bool, *, invented: bool = False, searched: bool = False
) -> tuple[str, str]:
    """(method, reason) for a merge of ``ingredients``, perhaps to be searched.

    ``rows`` says whether there are unlabelled rows, ``invented`` whether these are made up.
    """
    if not all(isinstance(one.deltas, dict) for one in ingredients):
        return (
            "task_arithmetic",
            "whole checkpoints are among the inputs, and a sum is the one merge that is quick there",
        )
    apart = _on_one_basis(ingredients)
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
    if apart and all("gram" in one.statistics for one in ingredients):
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
        "(--method distill --data invented), in minutes, or by all adapters side by side (--method ensemble)",
    )


def _on_one_basis(ingredients: Sequence[Ingredient]) -> bool:
    """Whether all hold rows of the same orthogonal basis."""
    seeds = {None if one.basis is None else one.basis.seed for one in ingredients}
    return len(seeds) == 1 and None not in seeds
