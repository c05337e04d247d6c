"""Spectra of a site's Deltas: what the methods share that combine singular directions, all from factors."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Dense, LowRank, svd
from mergekit_bert.composing.method import Site

Spectrum = tuple[Float[Tensor, "out _"], Float[Tensor, "_"], Float[Tensor, "_ in"]]
"""``U``, ``S`` and ``Vᵀ`` at the numerical rank: no direction of a null space is ever among them."""


def spectra(site: Site) -> list[Spectrum]:
    """The SVD of every ``λi Δi``, so that a weight scales singular values and its sign turns singular vectors."""
    pairs = zip(site.deltas, site.weights, strict=True)
    return [svd(delta.to(torch.float64).scaled(weight)) for delta, weight in pairs]


def side_by_side(parts: Sequence[Spectrum]) -> Spectrum:
    """``[U1 | …]``, all values, and ``[V1 | …]ᵀ``: the sum of the Deltas, in directions not yet orthogonal."""
    left, values, right = zip(*parts, strict=True)
    return torch.cat(left, 1), torch.cat(values), torch.cat(right, 0)


def summed(parts: Sequence[Spectrum]) -> Spectrum:
    """The SVD of the sum; where Deltas cancel, what is left over is no direction."""
    left, values, right = side_by_side(parts)
    return svd(LowRank(left * values, right), max(values.tolist(), default=0.0))


def polar(directions: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """``P Qᵀ`` of ``P diag(S) Qᵀ``, over the numerical rank: the nearest orthonormal columns where there can be any."""
    left, _, right = svd(Dense(directions))
    return left @ right
