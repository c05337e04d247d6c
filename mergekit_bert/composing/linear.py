"""The weighted sum of Deltas, on which all linear methods stand."""

from mergekit_bert.adapters.delta import Delta, add
from mergekit_bert.composing.method import Site


def weighted_sum(site: Site) -> Delta:
    """``Σ λi Δi``, exactly: on Deltas, never on ``A`` and ``B`` apart, so that a weight counts once, with its sign."""
    return add(site.deltas, site.weights)
