"""OrthoAda: the plain sum of adapters whose frozen factors are orthogonal (Po et al. 2023, arXiv 2312.02432).

With ``A`` rows of one orthogonal matrix, ``Δi Δjᵀ = 0`` for i ≠ j and ``(Σj Δj) Aiᵀ = si Bi``: along its own input
directions every adapter is kept whole, hence weights of 1.
"""

from collections.abc import Sequence

from mergekit_bert.adapters.basis import shared_basis
from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.method import Method


def _check(merge_inputs: Sequence[MergeInput]) -> None:
    shared_basis({one.name: one.basis for one in merge_inputs if one.deltas})


RECORD = Method(
    name="orthoada",
    description="sum of adapters that were trained on one shared orthogonal basis",
    formula="Δ = Σ λi Δi, with Ai Ajᵀ = 0",
    source="arXiv 2312.02432",
    merge=weighted_sum,
    needs=("basis",),
    check=_check,
    linear=True,
)
