"""Deltas: the change of one site's weight, ``W' = W + Δ``, low-rank or dense. All merging stands on this algebra.

A low-rank Delta is ``B @ A``; a scale or a weight is multiplied into ``B`` once, so that no sign is lost and no factor
counts twice. Everything stays in factors until someone truly needs the dense matrix. Both kinds have the same
attributes and methods, so that no caller asks which of the two it holds.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
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
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return self.B.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    @property
    def reads(self) -> Float[Tensor, "r in"]:
        """Rows that span what ``Δ`` reads of its input."""
        return self.A

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores of it, by name; :func:`delta_of` makes it again."""
        return {"A": self.A, "B": self.B}

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix."""
        return self.B @ self.A

    def scaled(self, weight: float) -> "LowRank":
        """``weight · Δ``."""
        return LowRank(weight * self.B, self.A)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "LowRank":
        """The same in ``dtype``, and on ``device`` where one is given."""
        return LowRank(self.B.to(device, dtype), self.A.to(device, dtype))

    def left(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        """``L Δ``, of the function ``change`` that multiplies a matrix by ``L`` from the left."""
        return LowRank(change(self.B), self.A)

    def right(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        """``Δ R``, of the function ``change`` that multiplies a matrix by ``R`` from the right."""
        return LowRank(self.B, change(self.A))

    def add_output(self, out: Float[Tensor, "n out"], x: Float[Tensor, "n in"]) -> None:
        """Add ``x Δᵀ`` to ``out``, in place."""
        out.addmm_(x @ self.A.T, self.B.T)


@dataclass(frozen=True)
class Dense:
    """``Δ`` as it is."""

    matrix: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> None:
        """None: it may have any."""
        return

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes

    @property
    def reads(self) -> Float[Tensor, "out in"]:
        """Rows that span what ``Δ`` reads of its input: its own."""
        return self.matrix

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores of it, by name; :func:`delta_of` makes it again."""
        return {"dense": self.matrix}

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix."""
        return self.matrix

    def scaled(self, weight: float) -> "Dense":
        """``weight · Δ``."""
        return Dense(weight * self.matrix)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Dense":
        """The same in ``dtype``, and on ``device`` where one is given."""
        return Dense(self.matrix.to(device, dtype))

    def left(self, change: Callable[[Tensor], Tensor]) -> "Dense":
        """``L Δ``, of the function ``change`` that multiplies a matrix by ``L`` from the left."""
        return Dense(change(self.matrix))

    def right(self, change: Callable[[Tensor], Tensor]) -> "Dense":
        """``Δ R``, of the function ``change`` that multiplies a matrix by ``R`` from the right."""
        return Dense(change(self.matrix))

    def add_output(self, out: Float[Tensor, "n out"], x: Float[Tensor, "n in"]) -> None:
        """Add ``x Δᵀ`` to ``out``, in place."""
        out.addmm_(x, self.matrix.T)


Delta = LowRank | Dense


def tensor_shapes(shape: tuple[int, int], rank: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Delta of a ``rank`` (None: dense)."""
    out, inner = shape
    return {"dense": shape} if rank is None else {"A": (rank, inner), "B": (out, rank)}


def delta_of(tensors: Mapping[str, Tensor]) -> Delta:
    """The inverse of ``tensors()``."""
    return Dense(tensors["dense"]) if "dense" in tensors else LowRank(tensors["B"], tensors["A"])


def zero(shape: tuple[int, int]) -> LowRank:
    """No change: rank 0."""
    return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))


def factors(delta: Delta) -> LowRank:
    """``Δ`` as factors, exactly: beside a dense one stands the unit matrix of its shorter side."""
    if isinstance(delta, LowRank):
        return delta
    out, inner = delta.shape
    unit = torch.eye(min(out, inner), dtype=delta.dtype, device=delta.matrix.device)
    return LowRank(unit, delta.matrix) if out <= inner else LowRank(delta.matrix, unit)


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


def narrow(delta: Delta) -> Delta:
    """The same with factors no wider than the matrix is: beyond that one of them is the matrix itself."""
    if delta.rank is None or delta.rank <= min(delta.shape):
        return delta
    return factors(Dense(delta.to(torch.float64).dense().to(delta.dtype)))


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
    return LowRank((u[:, :rank] * values[:rank]).to(delta.dtype), vh[:rank].to(delta.dtype)), lost


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
    return (LowRank(left, right).to(delta.dtype), lost) if lost > _COARSE else None


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


def energy(delta: Delta, gram: Float[Tensor, "in in"]) -> float:
    """``E‖Δ x‖² = tr(Δ G Δᵀ)``, of the second moments ``G`` of the inputs; in float64."""
    if isinstance(delta, Dense):
        matrix = delta.matrix.double()
        return float((matrix @ gram * matrix).sum())
    left, right = delta.B.double(), delta.A.double()
    return float(((left.T @ left) * (right @ gram @ right.T)).sum())
