"""Iso-C: the sum of the Deltas with all its singular values made equal (Marczak et al. 2025).

arXiv 2502.04959: ``Δ = σ̄ U Vᵀ`` of ``Σ Δi = U S Vᵀ``, ``σ̄`` the mean of ``S``. The paper's matrices have
full rank. Here the mean is over the numerical rank, and no direction outside of it is raised to ``σ̄``: nothing was
ever learned there.
"""

from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spectral import spectra, summed


def _merge(site: Site) -> Delta:
    u, values, vh = summed(spectra(site))
    return LowRank(values.mean() * u, vh)


RECORD = Method(
    name="iso_c",
    description="sum with a flat spectrum",
    formula="Δ = mean(S) U Vᵀ, of Σ λi Δi = U S Vᵀ",
    source="arXiv 2502.04959",
    merge=_merge,
    one_stays=None,
)
