"""Iso-CTS: a flat spectrum over the directions of the sum and some that single tasks add (Marczak et al. 2025).

arXiv 2502.04959. Of the ``K`` directions that the sum has, the leading ``k`` are kept as common; each
task puts ``s = (K − k) / T`` of its own in the place of the others, the leading ones of ``(I − Uk Ukᵀ) Δi``. All are
made orthogonal by polar factors and get the mean of their singular values. ``K`` is the numerical rank of the sum, the
paper's smaller side of the matrix where that is full. ``s`` is rounded down; what does not divide goes to the common
ones.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, LowRank, svd, zero
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spectral import Spectrum, polar, side_by_side, spectra, summed
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How many directions are common."""

    common: float = option(0.8, "share of the directions that are common, the rest goes to single tasks", low=0, high=1)


def _beyond(part: Spectrum, common: Float[Tensor, "out k"], count: int) -> Spectrum:
    """The ``count`` leading directions of a Delta outside of the common columns, if there are so many."""
    u, values, vh = part
    own = u * values
    u, rest, vh = svd(LowRank(own - common @ (common.T @ own), vh), max(values.tolist(), default=0.0))
    return u[:, :count], rest[:count], vh[:count]


def _merge(site: Site) -> Delta:
    parts = [part for part in spectra(site) if len(part[1])]
    if not parts:
        return zero(site.deltas[0].shape)
    u, values, vh = summed(parts)
    each = (len(values) - round(site.options.common * len(values))) // len(parts)
    shared = len(values) - each * len(parts)
    common = u[:, :shared], values[:shared], vh[:shared]
    left, values, right = side_by_side([common, *(_beyond(part, common[0], each) for part in parts)])
    return LowRank(values.mean() * polar(left), polar(right.T).T)


RECORD = Method(
    name="iso_cts",
    description="directions of the sum and of single tasks, made orthogonal, with a flat spectrum",
    formula="Δ = mean(S) polar([Uk | U1 | …]) polar([Vk | V1 | …])ᵀ, Uk of Σ λi Δi, Ui of (I − Uk Ukᵀ) λi Δi",
    source="arXiv 2502.04959",
    merge=_merge,
    options=Options,
    one_stays=None,
)
