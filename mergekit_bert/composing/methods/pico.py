"""Pico: output directions that the tasks crowd into are scaled down before a merge, any merge (Tang & Yang 2026).

arXiv 2604.16826. ``[B1 | … | BT] = U diag(σ) …`` gives each direction's share ``sj = σj² / Σ σ²``; every ``Bi`` is
scaled by ``1 / (1 + (T − 1) sj)`` along ``uj``; the merge is scaled to the mean norm of the Deltas that went in.
``Bi`` is not a function of the Delta (``B R`` and ``R⁻¹ A`` are the same one); ``Ui Si`` of the Delta stands for it
here, which has the same directions and sizes as ``Bi`` has where the rows of ``Ai`` are orthonormal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense, norm, svd
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spaces import Leave
from mergekit_bert.composing.spectral import spectra
from mergekit_bert.composing.within import INNER, merge_within, survey_within
from mergekit_bert.option import option

_CANCELLED = 1e-6
"""A merge smaller than this share of what went in is rounding that a cancellation left: not to be blown up."""


@dataclass(frozen=True)
class Options:
    """What merges."""

    inner: str = option("task_arithmetic", "method that merges, with its own defaults", choices=INNER)


def _calibrated(delta: Delta, u: Float[Tensor, "out k"], factors: Float[Tensor, "k"]) -> Delta:
    """``(I + U diag(f − 1) Uᵀ) Δ``."""

    def scale(columns: Float[Tensor, "out m"]) -> Float[Tensor, "out m"]:
        return columns + u @ ((factors - 1)[:, None] * (u.T @ columns))

    return delta.to(torch.float64).left(scale)


def _enter(site: Site) -> tuple[Site, Leave]:
    u, values, _ = svd(Dense(torch.cat([u * values for u, values, _ in spectra(site)], 1)))
    shared = values.square() / values.square().sum()
    factors = 1 / (1 + (len(site.deltas) - 1) * shared)
    size = fmean(map(norm, site.weighted))

    def leave(merged: Delta) -> Delta:
        now = norm(merged)
        return merged.scaled(size / now) if now > _CANCELLED * size else merged

    return replace(site, deltas=[_calibrated(delta, u, factors) for delta in site.deltas]), leave


def _merge(site: Site) -> Delta:
    return merge_within(site, _enter)


def _survey(sites: Sequence[Site]) -> Any:
    return survey_within(sites, _enter)


RECORD = Method(
    name="pico",
    description="output directions that many share scaled down, then merged by another method",
    formula="Δ = γ inner(U diag(1 / (1 + (T − 1) σj² / Σσ²)) Uᵀ Δi), U and σ of [U1 S1 | …]",
    source="arXiv 2604.16826",
    merge=_merge,
    options=Options,
    survey=_survey,
    one_stays={"inner": "task_arithmetic"},
)
