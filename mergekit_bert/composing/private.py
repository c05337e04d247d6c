"""Private residuals: what a merge took from a task, at low rank, kept for that task beside what all share.

``Δmerged + svd_r(Δi − Δmerged)``: a task runs with the shared Delta and its own residual of rank ``r``. These are the
shared and the compressed exclusive knowledge of Lu et al. 2024 (Twin-Merging, arXiv 2406.15479), with the task named by
the caller instead of guessed by a router. Huang et al. 2024 (EMR-Merging, arXiv 2405.17461) keep a mask and a scale of
the shared part for each task instead; Tang et al. 2024 (SMILE, arXiv 2408.10174) keep the low-rank part of each expert
beside the base, and choose among them by the input.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, add, compress, norm, zero
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.patch import TaskSpecific
from mergekit_bert.composing.lazy import LazyMap
from mergekit_bert.composing.merge_input import MergeInput

_ROUNDING = 1e-6
"""A difference this small beside what it was made from is rounding of float32 factors."""


def residuals(
    merge_inputs: Sequence[MergeInput], deltas: Mapping[str, Delta], shifts: Tensors, rank: int
) -> dict[str, TaskSpecific]:
    """What every task keeps for itself beside the merged ``deltas`` and ``shifts``, made when it is asked for.

    At every site the best approximation of at most ``rank`` of what is missing to the task's own Delta; of biases and
    norms, which are vectors, all that is missing. Other parameters (the embeddings of whole checkpoints) stay as they
    were merged. The head, and what it alone reads, is the task's as ever.
    """
    vectors = [name for name in shifts if shifts[name].dim() == 1]
    return {
        task: TaskSpecific(
            specific.head,
            LazyMap([*deltas, *specific.deltas], partial(_delta, merge_input, specific, deltas, rank)),
            LazyMap([*vectors, *specific.shifts], partial(_shift, merge_input, specific, shifts)),
            specific.extras,
        )
        for merge_input in merge_inputs
        for task, specific in merge_input.own.items()
    }


def _delta(merge_input: MergeInput, specific: TaskSpecific, merged: Mapping[str, Delta], rank: int, site: str) -> Delta:
    """``svd_r(Δi − Δmerged)`` in float32; what the head alone reads as it is."""
    if site not in merged:
        return specific.deltas[site]
    shared = merged[site].to(torch.float64)
    mine = [deltas[site].to(torch.float64) for deltas in (merge_input.deltas, specific.deltas) if site in deltas]
    missing = add([*mine, shared], [*(1.0 for _ in mine), -1.0])
    if norm(missing) <= _ROUNDING * max(map(norm, [*mine, shared])):
        return zero(shared.shape)
    return compress(missing, rank)[0].to(torch.float32)


def _shift(merge_input: MergeInput, specific: TaskSpecific, merged: Tensors, name: str) -> Tensor:
    """What is missing of a bias or norm; what the head alone reads as it is."""
    if name not in merged:
        return specific.shifts[name]
    mine = [shifts[name].float() for shifts in (merge_input.shifts, specific.shifts) if name in shifts]
    return sum(mine, -merged[name])
