"""TIES: trim each Delta, elect a sign for every entry, take the mean of those that have it (Yadav et al. 2023).

arXiv 2306.01708, algorithm 1. The paper trims all weights of a model together (``trim=adapter``), which may leave a
site with nothing; trimmed one by one, every site keeps its share.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.entrywise import agreed, largest, portion, trimmed, weighted
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How much is kept, and who elects."""

    density: float = option(0.2, "share of entries kept, rounded up", low=0.0, high=1.0)
    trim: str = option("tensor", "where the largest entries are sought", choices=("tensor", "adapter"))
    election: str = option("sum", "sign of the sum, or of the majority", choices=("sum", "count"))


def _survey(sites: Sequence[Site]) -> Mapping[tuple[str, str], int] | None:
    """How many entries are kept, by site and adapter, where an adapter is trimmed as a whole."""
    if not sites or sites[0].options.trim == "tensor":
        return None
    whole: dict[str, list[tuple[str, Delta]]] = {}
    for site in sites:
        for name, delta in zip(site.names, site.deltas, strict=True):
            whole.setdefault(name, []).append((site.name, delta))
    counts = {}
    for name, parts in whole.items():
        flat = [delta.dense().flatten() for _, delta in parts]
        together = torch.cat(flat)
        kept = largest(together, math.ceil(portion(sites[0].options.density, together.numel())))
        for (site_name, _), here in zip(parts, kept.split([len(one) for one in flat]), strict=True):
            counts[site_name, name] = int(here.sum())
    return counts


def _merge(site: Site) -> Delta:
    kept = []
    for name, delta in zip(site.names, site.deltas, strict=True):
        values = delta.dense()
        share = math.ceil(portion(site.options.density, values.numel()))
        kept.append(trimmed(values, share if site.survey is None else site.survey[site.name, name]))
    return Dense(agreed(weighted(kept, site.weights), site.options.election))


RECORD = Method(
    name="ties",
    description="mean of the largest entries of each, as far as they agree in sign",
    formula="Δ = mean of λi trim(Δi) where sgn(λi trim(Δi)) = sgn(Σ λj trim(Δj)), by entry",
    source="arXiv 2306.01708",
    merge=_merge,
    options=Options,
    survey=_survey,
    one_stays={"density": 1},
)
