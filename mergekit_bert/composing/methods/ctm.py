"""Compress then merge: shared subspaces of R directions first, and a merge inside them (He et al. 2026).

arXiv 2606.03723. ``U (out, R)`` and ``V (in, R)`` keep the most of all Deltas, ``max Σ ‖Uᵀ Δi V‖²`` (Tucker-2,
started by HOSVD, improved by HOOI), where norms are first drawn together, ``Δi (β + (1 − β) mean‖Δ‖ / ‖Δi‖)``, lest the
largest task chooses alone. Then ``Oi = Uᵀ Δi V`` of the Deltas as they are is merged by any method, and
``Δ = U O Vᵀ`` has rank R by construction. All of it happens in the core of the Deltas, which loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense, LowRank, svd
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spaces import SPACES, Leave
from mergekit_bert.composing.within import INNER, merge_within, survey_within
from mergekit_bert.option import option

_STEPS = 100
_TOLERANCE = 1e-8
"""HOOI ends when a step adds less than this share of the energy."""


@dataclass(frozen=True)
class Options:
    """How wide the subspaces are, whom they serve, and what merges inside."""

    rank: int = option(0, "directions of the shared subspaces; 0: the largest rank among the inputs", low=0)
    beta: float = option(0.25, "how much norms count for the subspaces: 0 not at all, 1 in full", low=0, high=1)
    inner: str = option("task_arithmetic", "method that merges, with its own defaults", choices=INNER)


def _leading(slices: Float[Tensor, "t n m"], rank: int) -> Float[Tensor, "n r"]:
    """The leading left singular vectors of ``[X1 | … | XT]``."""
    u, _, _ = torch.linalg.svd(torch.cat(list(slices), 1), full_matrices=False)
    left: Tensor = u[:, :rank]
    return left


def shared_subspaces(slices: Float[Tensor, "t n m"], rank: int) -> tuple[Float[Tensor, "n r"], Float[Tensor, "m r"]]:
    """Orthonormal ``U`` and ``V`` of at most ``rank`` columns with ``Σ ‖Uᵀ Xi V‖²`` as large as HOOI finds it."""
    u, v = _leading(slices, rank), _leading(slices.mT, rank)
    kept = 0.0
    for _ in range(_STEPS):
        before, kept = kept, float((u.T @ slices @ v).square().sum())
        if kept - before <= _TOLERANCE * kept:
            break
        u = _leading(slices @ v, rank)
        v = _leading((u.T @ slices).mT, rank)
    return u, v


def _enter(site: Site) -> tuple[Site, Leave]:
    inner, leave = SPACES["core"].enter(site.deltas)
    deltas = torch.stack([delta.dense() for delta in inner])
    weighted = deltas * torch.tensor(site.weights, dtype=deltas.dtype)[:, None, None]
    norms = torch.linalg.matrix_norm(weighted, keepdim=True)
    beta = site.options.beta
    rank = site.options.rank or max(len(svd(delta)[1]) for delta in site.deltas)
    u, v = shared_subspaces(weighted * (beta + (1 - beta) * norms.mean() / norms), rank)
    inside: list[Delta] = [Dense(one) for one in u.T @ deltas @ v]
    return replace(site, deltas=inside), lambda merged: leave(LowRank(u @ merged.dense().double(), v.T))


def _merge(site: Site) -> Delta:
    return merge_within(site, _enter)


def _survey(sites: Sequence[Site]) -> Any:
    return survey_within(sites, _enter)


RECORD = Method(
    name="ctm",
    description="merged by another method inside shared subspaces of a given rank",
    formula="Δ = U inner(Uᵀ Δi V) Vᵀ, of the U and V (R columns) that maximise Σ ‖Uᵀ Δi V‖²",
    source="arXiv 2606.03723",
    merge=_merge,
    options=Options,
    survey=_survey,
    one_stays={"inner": "task_arithmetic"},
)
