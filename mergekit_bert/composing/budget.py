"""A budget of bytes as a rank: how many directions at every site a merged file may hold."""

import dataclasses
import math
from collections.abc import Sequence

from mergekit_bert.composing.composition import Merged
from mergekit_bert.composing.ingredient import Ingredient
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.errors import CompositionError

_RECORD, _RECORD_OF_A_SITE = 2**16, 2**8
"""Bytes left for what a file says beside its tensors."""


def held_to(size: float, recipe: Recipe, ingredients: Sequence[Ingredient], keep_inputs: bool = False) -> Recipe:
    """``recipe`` at the rank that :func:`rank_within` finds; raises CompositionError for what a rank cannot hold."""
    told = {"--rank": recipe.rank, "--private": recipe.private, "--keep-inputs": keep_inputs}
    for name, given in (told | {f"--method {ENSEMBLE}": recipe.method == ENSEMBLE}).items():
        if given:
            raise CompositionError("--size", f"{name} as well", "one of the two", f"drop {name} or --size")
    return dataclasses.replace(recipe, rank=rank_within(ingredients, size))


def rank_within(ingredients: Sequence[Ingredient], size: float) -> int:
    """The largest rank of all merged Deltas at which their file, in float32, takes at most ``size`` MiB.

    Heads and shifts, which no rank makes smaller, come first. Raises CompositionError where not even rank 1 fits.
    """
    model = merge(ingredients, Recipe("task_arithmetic"), lazy=True)
    assert isinstance(model, Merged)
    shapes = [delta.shape for delta in model.deltas.values()]
    fixed = sum(tensor.nbytes for tensor in model.shifts.values()) + _RECORD + _RECORD_OF_A_SITE * len(shapes)
    for own in (one.read() for one in model.own.values()):
        fixed += sum(one.nbytes for one in (*own.head.values(), *own.deltas.values(), *own.shifts.values()))
    each = 4 * sum(out + in_ for out, in_ in shapes)
    rank = int((size * 2**20 - fixed) // each) if each else 0
    if rank < 1:
        least = math.ceil((fixed + each) / 2**20 * 100) / 100
        raise CompositionError(
            f"--size {size:g}", "too few MiB for these heads", f"at least {least}, for rank 1", f"give --size {least}"
        )
    return min(rank, *(min(shape) for shape in shapes))
