"""Spaces: coordinates in which a method sees the Deltas of one site, and the way back.

A space turns Deltas into comparable ones and a merged one back into a Delta; a method combines them. Any method works
in any space that its record names. Going in and back loses nothing: ``leave(enter(Δi)) = Δi``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense, LowRank, factors, svd

Leave = Callable[[Delta], Delta]


@dataclass(frozen=True)
class Space:
    """``enter(deltas)`` gives them in the space's coordinates (float64) and the function that leads back."""

    name: str
    description: str
    source: str
    enter: Callable[[Sequence[Delta]], tuple[list[Delta], Leave]]


def _full(deltas: Sequence[Delta]) -> tuple[list[Delta], Leave]:
    return list(deltas), lambda merged: merged


def _core(deltas: Sequence[Delta]) -> tuple[list[Delta], Leave]:
    """``Mi = Uᵀ Δi V`` with bases of all columns and of all rows, at most ``Σr × Σr``.

    The paper stacks the adapters' own ``B`` and ``A``, which are not unique (``B R`` and ``R⁻¹ A`` are the same
    Delta). Here each Delta is split evenly first, ``U √S`` and ``√S Vᵀ``, so that the result is a function of the
    Deltas alone. Both span the same spaces.
    """
    parts = [svd(delta) for delta in deltas]
    left = _columns(torch.cat([u * values.sqrt() for u, values, _ in parts], 1))
    right = _columns(torch.cat([vh.T * values.sqrt() for _, values, vh in parts], 1))
    inner: list[Delta] = [Dense((left.T @ u * values) @ (vh @ right)) for u, values, vh in parts]

    def leave(merged: Delta) -> Delta:
        tall = merged.to(torch.float64).left(lambda inside: left @ inside)
        return factors(tall).right(lambda rows: rows @ right.T)

    return inner, leave


def _knots(deltas: Sequence[Delta]) -> tuple[list[Delta], Leave]:
    """``[Δ1 | … | ΔT] = U Σ [V1ᵀ | … | VTᵀ]``; a Delta's coordinates are ``Σ Viᵀ = Uᵀ Δi``, at most ``Σr × in``."""
    parts = [svd(delta) for delta in deltas]
    # [Δ1 | …] = [U1 S1 | …] · diag(V1ᵀ, …) and the second factor has orthonormal rows, so the first has all of U and Σ.
    left = _columns(torch.cat([u * values for u, values, _ in parts], 1))
    inner: list[Delta] = [LowRank(left.T @ u * values, vh) for u, values, vh in parts]

    def leave(merged: Delta) -> Delta:
        return factors(merged.to(torch.float64)).left(lambda inside: left @ inside)

    return inner, leave


def _columns(stacked: Float[Tensor, "n m"]) -> Float[Tensor, "n k"]:
    """The left singular vectors of a matrix, at its numerical rank."""
    return svd(Dense(stacked))[0]


SPACES = {
    space.name: space
    for space in (
        Space("full", "the Deltas as they are", "", _full),
        Space("core", "their common core, bases of all rows and columns apart", "arXiv 2509.17786", _core),
        Space("knots", "their common column space", "arXiv 2410.19735", _knots),
    )
}
