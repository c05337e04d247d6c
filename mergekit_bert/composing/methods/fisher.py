"""Fisher merging: the mean of the Deltas, entry by entry weighted by Fisher information (arXiv 2111.09832)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How the information of different tasks is made comparable."""

    normalize: bool = option(True, "Scale each adapter's information to norm 1 over all sites.")
    floor: float = option(
        1e-6, "Share of a site's mean information added to every entry; where none is, the mean.", low=1e-12
    )


def _norms(sites: Sequence[Site]) -> dict[str, float]:
    """``‖Fi‖`` over all sites, by adapter: information is in units that differ from task to task."""
    energy: dict[str, float] = {}
    for site in sites:
        for name, one in zip(site.names, site.statistics, strict=True):
            fisher = one["fisher"]
            own = float(fisher.left.double().square().sum() * fisher.right.double().square().sum())
            energy[name] = energy.get(name, 0.0) + own
    return {name: value**0.5 for name, value in energy.items()}


def _merge(site: Site) -> Delta:
    """``Δ = Σ λi Fi ∘ Δi / Σ Fi`` entry by entry, with the weights scaling the Deltas alone.

    In the paper ``λi`` stands below the line too, so that only its share counts; here the merge is linear in the
    weights. Norm 1 is the authors' code's; its floor is an absolute one, and of the first model alone.
    """
    norms = (site.survey or {}) if site.options.normalize else {}
    scales = [norms.get(name) or 1.0 for name in site.names]
    found = [one["fisher"].dense() / scale for one, scale in zip(site.statistics, scales, strict=True)]
    fishers = torch.stack(found)
    fishers = fishers + (site.options.floor * float(fishers.mean()) or 1.0)
    deltas = torch.stack([delta.dense().double() for delta in site.weighted])
    return Dense((fishers / fishers.sum(0) * deltas).sum(0))


RECORD = Method(
    name="fisher",
    description="mean weighted entry by entry by how much each task's answers depend on it",
    formula="Δ = Σ λi Fi ∘ Δi / Σ Fi, Fi = E[(∂ log p / ∂W)²]",
    source="arXiv 2111.09832",
    merge=_merge,
    options=Options,
    needs=("fisher",),
    spaces=("full",),
    survey=_norms,
)
