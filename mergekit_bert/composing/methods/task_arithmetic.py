"""Task arithmetic: the sum of the Deltas times one coefficient (Ilharco et al. 2022, arXiv 2212.04089)."""

from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.method import Method

_COEFFICIENT = 0.4
"""What Yadav et al. 2023 (arXiv 2306.01708) use for task arithmetic where no rows can be spent on choosing."""

RECORD = Method(
    name="task_arithmetic",
    description=f"sum times {_COEFFICIENT}, or times the weights given",
    formula="Δ = λ Σ Δi",
    source="arXiv 2212.04089",
    merge=weighted_sum,
    weights=lambda merge_inputs: [_COEFFICIENT] * len(merge_inputs) if len(merge_inputs) > 1 else [1.0],
    default_weights=f"{_COEFFICIENT} each (1 for a single adapter)",
    linear=True,
)
