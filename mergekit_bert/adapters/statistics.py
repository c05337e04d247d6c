"""Statistics of a site that data-driven merges need: the Gram matrix of its inputs, and Fisher information.

Both are kept small enough to travel in the adapter file; :mod:`mergekit_bert.adapters.measuring` makes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.registry import unknown

RANK = 32
"""Directions that a Gram matrix keeps beside its diagonal."""


@dataclass(frozen=True)
class Gram:
    """``E[x xᵀ]`` over the inputs of a site, as ``diag(diagonal) + factor factorᵀ``: its diagonal is exact.

    ``count`` is the number of inputs (tokens; in the last layer, where no other is read, first tokens), ``lost`` the
    share of ``‖G‖²`` that the rank cost.
    """

    diagonal: Float[Tensor, "in"]
    factor: Float[Tensor, "in k"]
    count: int
    lost: float

    @classmethod
    def of(cls, matrix: Float[Tensor, "in in"], count: int, rank: int = RANK) -> "Gram":
        """The leading ``rank`` eigenvectors, and what of the diagonal they leave."""
        values, vectors = torch.linalg.eigh(matrix)
        factor = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
        kept = factor @ factor.T
        rest = (matrix.diagonal() - kept.diagonal()).clamp(min=0)
        return cls(rest.float().cpu(), factor.float().cpu().contiguous(), count, _lost(matrix, kept + rest.diag()))

    @property
    def shape(self) -> tuple[int, int]:
        """(in, k)."""
        return self.factor.shape[0], self.factor.shape[1]

    @staticmethod
    def shapes(width: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return {"diagonal": (width,), "factor": (width, rank)}

    def fits(self, size: tuple[int, int] | None) -> bool:
        """Whether it fits a site of ``size`` (None: unknown)."""
        return (size is None or self.shape[0] == size[1]) and bool((self.diagonal >= 0).all())

    def dense(self) -> Float[Tensor, "in in"]:
        """The matrix, in float64."""
        factor = self.factor.double()
        return self.diagonal.double().diag() + factor @ factor.T


@dataclass(frozen=True)
class Fisher:
    """``E[(∂ log p(y|x) / ∂W)²]`` of a site, labels drawn from the model itself, as ``left ⊗ right``.

    ``left`` is the mean of each row, ``right`` that of each column over the mean of all: the non-negative factors of
    rank one of least divergence (Shazeer & Stern 2018, arXiv 1804.04235). ``count`` is the number of texts, ``lost``
    the error's share of ``‖F‖²``.
    """

    left: Float[Tensor, "out"]
    right: Float[Tensor, "in"]
    count: int
    lost: float

    @classmethod
    def of(cls, matrix: Float[Tensor, "out in"], count: int) -> "Fisher":
        """The factors of ``matrix``, which has no negative entry."""
        left, right = matrix.mean(1), matrix.mean(0)
        right = right / matrix.mean().clamp(min=torch.finfo(matrix.dtype).tiny)
        return cls(left.float().cpu(), right.float().cpu(), count, _lost(matrix, torch.outer(left, right)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.left), len(self.right)

    @staticmethod
    def shapes(height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return {"left": (height,), "right": (width,)}

    def fits(self, size: tuple[int, int] | None) -> bool:
        """Whether it fits a site of ``size`` (None: unknown)."""
        return size in (None, self.shape) and all(bool((one >= 0).all()) for one in (self.left, self.right))

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix, in float64."""
        return torch.outer(self.left.double(), self.right.double())


def _lost(matrix: Tensor, kept: Tensor) -> float:
    """The share of ``‖matrix‖²`` that ``kept`` misses."""
    energy = float(matrix.square().sum())
    return float((matrix - kept).square().sum()) / energy if energy > 0 else 0.0


Statistic = Gram | Fisher
STATISTICS: Mapping[str, type[Gram] | type[Fisher]] = {"gram": Gram, "fisher": Fisher}


def check_kinds(names: Sequence[str]) -> None:
    """Raise UnknownNameError unless all statistics are known."""
    for name in names:
        if name not in STATISTICS:
            raise unknown("statistic", name, list(STATISTICS))
