"""FedAvg: the mean of the Deltas, weighted by how many examples each adapter saw (McMahan et al. 2017)."""

from collections.abc import Sequence

from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.method import Method
from mergekit_bert.errors import CompositionError


def _by_examples(merge_inputs: Sequence[MergeInput]) -> list[float]:
    """``λi = ni / Σ n`` from the recorded example counts."""
    counts = []
    for one in merge_inputs:
        if one.examples is None:
            raise CompositionError(
                f"fedavg, adapter {one.name!r}",
                "no example count",
                "a recorded number of examples",
                "give `weights` for all adapters",
            )
        counts.append(one.examples)
    return [count / sum(counts) for count in counts]


RECORD = Method(
    name="fedavg",
    description="mean weighted by the number of training examples",
    formula="Δ = Σ λi Δi, λi = ni / Σn",
    source="McMahan et al. 2017, arXiv 1602.05629",
    merge=weighted_sum,
    weights=_by_examples,
    default_weights="shares of the recorded example counts",
    linear=True,
)
