"""The recommended method for what is given: what the evidence of docs/evidence.md says, and why."""

from collections.abc import Sequence

from mergekit_bert.composing.ingredient import Ingredient


def recommend(ingredients: Sequence[Ingredient], rows: bool, searched: bool = False) -> tuple[str, str]:
    """(method, reason) for a merge of ``ingredients``, with unlabelled ``rows`` or without, perhaps to be searched."""
    if not all(isinstance(one.deltas, dict) for one in ingredients):
        return (
            "task_arithmetic",
            "whole checkpoints are among the inputs, and a sum is the one merge that is quick there",
        )
    if rows and not searched:
        return (
            "distill",
            "there are rows without labels, and what is fitted to the experts' answers on rows keeps most of them",
        )
    if all("gram" in one.statistics for one in ingredients):
        return "regmean", "all files hold Gram matrices, and of the quick methods it keeps most"
    if searched:
        return "pico", "a search is for methods that do not learn, and of those that measure nothing it keeps most"
    return (
        "pico",
        "neither rows nor statistics were given, and of the methods that need none it keeps most; fitted to texts that "
        "are made up, a merge often keeps more, in minutes (--method distill --data invented)",
    )
