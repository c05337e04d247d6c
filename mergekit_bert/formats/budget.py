"""The size limit of a merged file: the largest rank that fits, and the size of all inputs unmerged."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.errors import CompositionError
from mergekit_bert.formats.file import write_model
from mergekit_bert.models.composition import Ensemble

_LARGEST_SIZE = 1e9
_RECORD, _RECORD_OF_A_SITE = 2**16, 2**8
"""Bytes reserved for a file's metadata."""


def within_size(
    recipe: Recipe, merge_inputs: Sequence[MergeInput], size: float, merged: bool = False
) -> tuple[Recipe, str]:
    """``recipe`` for a file of at most ``size`` MiB, and the reason if it is then an ensemble ("" otherwise).

    It is the ensemble if that fits and no option is set that only a merge supports (``merged``: none beside the recipe
    either), otherwise the largest rank that fits. Raises CompositionError if ``size`` is invalid, conflicts with other
    options or is too small.
    """
    if not 0 < size <= _LARGEST_SIZE:
        expected = f"a positive number of MiB up to {_LARGEST_SIZE:g}"
        raise CompositionError("`size`", f"{size}", expected, "correct it")
    for name, value in (("`rank`", recipe.rank), ("`private`", recipe.private)):
        refuse_beside_size(name, value)
    refuse_beside_size(f"`method={ENSEMBLE}`", recipe.method == ENSEMBLE)
    customized = recipe.method or recipe.weights or recipe.layers or recipe.options or recipe.space != "full"
    if not (customized or merged) and ensemble_size(merge_inputs) <= size:
        reason = "all inputs fit into `size` unmerged, which loses nothing; set `rank` for one merged model instead"
        return dataclasses.replace(recipe, method=ENSEMBLE), reason
    return dataclasses.replace(recipe, rank=rank_within(merge_inputs, size)), ""


def refuse_beside_size(name: str, value: object) -> None:
    """Raise CompositionError if an option that determines the size itself is set."""
    if value:
        raise CompositionError("`size`", f"{name} as well", "one of the two", f"drop {name} or `size`")


def rank_within(merge_inputs: Sequence[MergeInput], size: float) -> int:
    """The largest rank of the merged Deltas with which the file, in float32, takes at most ``size`` MiB.

    Heads, biases and norms have the same size at any rank. Raises CompositionError if not even rank 1 fits.
    """
    shapes = {site: delta.shape for merge_input in merge_inputs for site, delta in merge_input.deltas.items()}
    shifts = {name: shift.numel() for merge_input in merge_inputs for name, shift in merge_input.shifts.items()}
    fixed = 4 * sum(shifts.values()) + _RECORD + _RECORD_OF_A_SITE * len(shapes)
    for specific in (specific.read() for merge_input in merge_inputs for specific in merge_input.own.values()):
        fixed += specific.nbytes
    each = 4 * sum(out + in_ for out, in_ in shapes.values())
    rank = int((size * 2**20 - fixed) // each) if each else 0
    if rank < 1:
        least = math.ceil((fixed + each) / 2**20 * 100) / 100
        raise CompositionError(
            f"`size={size:g}`", "too few MiB for these heads", f"at least {least}, for rank 1", f"give `size={least}`"
        )
    return min(rank, *(min(shape) for shape in shapes.values()))


def ensemble_size(merge_inputs: Sequence[MergeInput]) -> float:
    """MiB of all inputs as an ensemble in one file; infinite if some are not adapters."""
    adapters = {
        merge_input.name: merge_input.adapter for merge_input in merge_inputs if merge_input.adapter is not None
    }
    if len(adapters) < len(merge_inputs):
        return math.inf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ensemble.safetensors"
        write_model(path, Ensemble(adapters))
        return path.stat().st_size / 2**20
