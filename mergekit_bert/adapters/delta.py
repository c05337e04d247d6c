"""Deltas: the change of one site's weight, ``W' = W + Δ``, low-rank or dense. All merging stands on this algebra.

A low-rank Delta is ``B @ A``; a scale or a weight is multiplied into ``B`` once, so that no sign is lost and no factor
counts twice. Everything stays in factors until someone truly needs the dense matrix.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import linalg
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``Δ = B @ A``."""

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of ``B``: an upper bound of the matrix's rank."""
        return self.B.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix."""
        return self.B @ self.A

    def scaled(self, weight: float) -> "LowRank":
        """``weight · Δ``."""
        return LowRank(weight * self.B, self.A)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same in ``dtype``."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))


@dataclass(frozen=True)
class Dense:
    """``Δ`` as it is."""

    matrix: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix."""
        return self.matrix

    def scaled(self, weight: float) -> "Dense":
        """``weight · Δ``."""
        return Dense(weight * self.matrix)

    def to(self, dtype: torch.dtype) -> "Dense":
        """The same in ``dtype``."""
        return Dense(self.matrix.to(dtype))


Delta = LowRank | Dense


def add(deltas: Iterable[Delta], weights: Iterable[float] = itertools.repeat(1.0)) -> Delta:
    """``Σ wi Δi``, exactly: low-rank factors are put side by side, never averaged apart.

    Factors are made no wider than the matrix is; a dense part makes the sum dense, and of those no more than one is
    held beside it.
    """
    low, dense = list[LowRank](), None
    for delta, weight in zip(deltas, weights, strict=False):
        if isinstance(delta, LowRank):
            low.append(delta.scaled(weight))
        elif dense is None:
            dense = weight * delta.matrix
        else:
            dense = dense.to(torch.promote_types(dense.dtype, delta.matrix.dtype)).add_(delta.matrix, alpha=weight)
    if dense is not None:
        return Dense(sum((delta.dense() for delta in low), dense))
    return narrow(LowRank(torch.cat([delta.B for delta in low], 1), torch.cat([delta.A for delta in low], 0)))


def narrow(delta: LowRank) -> LowRank:
    """The same with factors no wider than the matrix is: beyond that one of them is the matrix itself."""
    out, inner = delta.shape
    if delta.rank <= min(out, inner):
        return delta
    matrix = (delta.B.double() @ delta.A.double()).to(delta.B.dtype)
    unit = torch.eye(min(out, inner), dtype=matrix.dtype)
    return LowRank(unit, matrix) if out <= inner else LowRank(matrix, unit)


def compress(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """The best approximation of ``Δ`` of at most ``rank``, and the share of ``‖Δ‖²`` that it loses.

    Eckart & Young 1936: a projection on the leading singular vectors.
    """
    leading = _project(delta, rank)
    if leading is not None:
        return leading
    u, values, vh = svd(delta)
    energy = values.square()
    lost = float(energy[rank:].sum() / energy.sum()) if float(energy.sum()) > 0 else 0.0
    dtype = delta.B.dtype if isinstance(delta, LowRank) else delta.matrix.dtype
    return LowRank((u[:, :rank] * values[:rank]).to(dtype), vh[:rank].to(dtype)), lost


_COARSE = 1e-8
"""A smaller share lost is of the size of a Gram matrix's rounding, with what that does to the vectors."""


def _project(delta: Delta, rank: int) -> tuple[LowRank, float] | None:
    """The leading left singular vectors alone, as eigenvectors of a Gram matrix: far quicker than all of an SVD.

    ``B A`` has the left singular vectors of ``B L`` with ``A Aᵀ = L Lᵀ``; those of ``Lᵀ Bᵀ B L`` lead to them. None
    where next to nothing is lost.
    """
    if isinstance(delta, LowRank):
        B, A = delta.B.double(), delta.A.double()
        inner = A @ A.T
        ridge = 1e-13 * float(inner.trace()) * torch.eye(len(inner), dtype=inner.dtype)
        root, failed = torch.linalg.cholesky_ex(inner + ridge)
        gram, tall = root.T @ (B.T @ B) @ root, True
        if failed:
            return None
    else:
        half = delta.matrix.double()
        tall = half.shape[0] > half.shape[1]
        gram = half.T @ half if tall else half @ half.T
    size, whole = len(gram), float(gram.trace())
    if not 0 < rank < size or not 0 < whole < math.inf:
        return None
    vectors = torch.from_numpy(linalg.eigh(gram.numpy(), subset_by_index=(size - rank, size - 1))[1])
    if isinstance(delta, LowRank):
        left = torch.linalg.qr(B @ (root @ vectors))[0]
        right = (left.T @ B) @ A
    else:
        left = torch.linalg.qr(half @ vectors if tall else vectors)[0]
        right = left.T @ half
    lost = 1 - float(right.square().sum()) / whole
    dtype = delta.B.dtype if isinstance(delta, LowRank) else delta.matrix.dtype
    return (LowRank(left.to(dtype), right.to(dtype)), lost) if lost > _COARSE else None


_RANK_TOLERANCE = 4 * torch.finfo(torch.float32).eps
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""


def svd(delta: Delta, scale: float = 0.0) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k"], Float[Tensor, "k in"]]:
    """``Δ = U diag(S) Vᵀ`` in float64, cut at the numerical rank ``k``, which is 0 for a zero Delta.

    ``scale`` is the size of what ``Δ`` was made from, where that is known: what a cancellation left is rounding.
    For factors: QR of both sides and an SVD of the small core; nothing of the size of ``Δ`` is made.
    """
    if isinstance(delta, LowRank):
        left, core_left = torch.linalg.qr(delta.B.double())
        right, core_right = torch.linalg.qr(delta.A.double().T)
        u, values, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        u, vh = left @ u, vh @ right.T
    else:
        u, values, vh = torch.linalg.svd(delta.matrix.double(), full_matrices=False)
    kept = int((values > _RANK_TOLERANCE * values[:1].clamp(min=scale)).sum())
    return u[:, :kept], values[:kept], vh[:kept]


def apply(weight: Float[Tensor, "out in"], delta: Delta) -> Float[Tensor, "out in"]:
    """``W + Δ``, added in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + delta.dense().to(weight.device, wide)


def norm(delta: Delta) -> float:
    """Frobenius norm of ``Δ``; from the factors by ``‖B A‖² = tr(BᵀB · AAᵀ)``, in float64."""
    if isinstance(delta, Dense):
        return float(torch.linalg.matrix_norm(delta.matrix.double()))
    left, right = delta.B.double(), delta.A.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
