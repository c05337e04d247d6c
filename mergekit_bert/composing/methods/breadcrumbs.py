"""Model Breadcrumbs: drop the largest and the smallest entries of each site, then add (Davari & Belilovsky 2023).

arXiv 2312.06795: outliers harm other tasks, and small changes are noise. The largest go first, whatever the density.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.entrywise import largest, portion, weighted
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.methods import task_arithmetic
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """The band that is kept; the defaults are where the authors' own search starts."""

    density: float = option(0.15, "share of entries kept, rounded up", low=0.0, high=1.0)
    gamma: float = option(0.006, "share of entries dropped as too large, rounded down", low=0.0, high=1.0)


def band(values: Float[Tensor, "out in"], density: float, gamma: float) -> Bool[Tensor, "out in"]:
    """Where those entries lie that come after the largest ones, by magnitude."""
    count = values.numel()
    cut = math.floor(portion(gamma, count))
    reach = min(cut + math.ceil(portion(density, count)), count)
    return largest(values, reach) & ~largest(values, cut)


def _merge(site: Site) -> Delta:
    options = site.options
    dense = [delta.dense() for delta in site.deltas]
    kept = [torch.where(band(values, options.density, options.gamma), values, 0) for values in dense]
    return Dense(weighted(kept, site.weights).sum(0))


RECORD = Method(
    name="breadcrumbs",
    description="sum without the largest and the smallest entries of each",
    formula="Δ = Σ λi mi ∘ Δi, mi = 1 for the share β of entries that follow the γ largest",
    source="arXiv 2312.06795",
    merge=_merge,
    weights=task_arithmetic.RECORD.weights,
    default_weights=task_arithmetic.RECORD.default_weights,
    options=Options,
    one_stays={"density": 1, "gamma": 0},
)
