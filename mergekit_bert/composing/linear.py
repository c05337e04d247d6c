"""The weighted sum of Deltas, on which all linear methods stand."""

from collections.abc import Sequence

from mergekit_bert.adapters.delta import Delta, add


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``Σ λi Δi``, exactly: on Deltas, never on ``A`` and ``B`` apart, so that a weight counts once, with its sign."""
    return add([delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)])
