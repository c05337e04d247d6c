"""Random sites for the spectral methods, and how each space sees them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_bert.adapters.delta import Delta, Dense, LowRank
from mergekit_bert.composing.method import METHODS, Site, make_options
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.hardware import generator

Array = NDArray[np.float64]


def low_rank(seed: int, rank: int, shape: tuple[int, int] = (9, 7), size: float = 1.0) -> LowRank:
    """Random float32 factors."""
    source = generator(seed, rank)
    B, A = torch.randn(shape[0], rank, generator=source), torch.randn(rank, shape[1], generator=source)
    return LowRank(size * B, A)


def trio(ranks: Sequence[int] = (2, 3, 1), shape: tuple[int, int] = (9, 7)) -> list[Delta]:
    """Deltas of different ranks and sizes."""
    return [low_rank(place, rank, shape, 0.5 + place) for place, rank in enumerate(ranks)]


def merge(
    method: str, deltas: Sequence[Delta], weights: Sequence[float] | None = None, space: str = "full", **options: Any
) -> Array:
    """The merged Delta, dense and in float64, by way of ``space``."""
    return merge_delta(method, deltas, weights, space, **options).to(torch.float64).dense().numpy()


def merge_delta(
    method: str, deltas: Sequence[Delta], weights: Sequence[float] | None = None, space: str = "full", **options: Any
) -> Delta:
    """The same as a Delta."""
    record = METHODS.get(method)
    inner, leave = SPACES[space].enter(deltas)
    names = [f"t{place}" for place in range(len(deltas))]
    site = Site("layer", names, inner, list(weights or [1.0] * len(deltas)), make_options(record, options))
    if record.survey is not None:
        site = replace(site, survey=record.survey([site]))
    return leave(record.merge(site))


def arrays(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> list[Array]:
    """``λi Δi``, dense and in float64."""
    return [
        weight * delta.to(torch.float64).dense().numpy()
        for delta, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True)
    ]


def thin(matrix: Array) -> tuple[Array, Array, Array]:
    """The SVD at the rank that numpy finds."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.linalg.matrix_rank(matrix, rtol=1e-6))
    return u[:, :rank], s[:rank], vh[:rank]


def root_polar(matrix: Array) -> Array:
    """The polar factor ``M (MᵀM)^(-1/2)``, by eigenvalues and not by an SVD."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    good = values > 1e-10 * values.max()
    return matrix @ (vectors[:, good] / np.sqrt(values[good])) @ vectors[:, good].T


def zero(shape: tuple[int, int] = (9, 7), rank: int = 0) -> LowRank:
    """A Delta of zero."""
    return LowRank(torch.zeros(shape[0], rank), torch.ones(rank, shape[1]))


def dense(deltas: Sequence[Delta]) -> list[Delta]:
    """The same Deltas as matrices."""
    return [Dense(delta.dense()) for delta in deltas]
