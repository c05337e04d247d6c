"""DELLA: drop small entries more often than large ones, then elect signs and take the mean (Deep et al. 2024).

arXiv 2406.11617, with the means of the authors' code: in each row, the chance of being dropped falls in equal
steps from ``p + ε/2`` for the smallest magnitude to ``p − ε/2`` for the largest; what stays is divided by its own
``1 − pi``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.entrywise import agreed, dropped, weighted
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How much is dropped, and how much magnitude matters."""

    drop: float = option(0.3, "chance of an entry to be dropped, on average", low=0.0, high=1.0)
    window: float = option(0.14, "by how much it differs between the ends of a row", low=0.0, high=1.0)


def chances(values: Float[Tensor, "out in"], drop: float, window: float) -> Float[Tensor, "out in"]:
    """The chance of every entry to be dropped: ``drop`` on average over each row.

    A window that reaches beyond 0 or 1 is narrowed, so that the average stays. A row of one entry has no order.
    """
    window = min(window, 2 * drop, 2 * (1 - drop))
    width = values.shape[1]
    order = values.abs().argsort(dim=1, stable=True)
    steps = torch.linspace(0.5, -0.5, width, dtype=torch.float64) if width > 1 else torch.zeros(width).double()
    by_rank = (drop + window * steps).clamp(0, 1)
    return torch.empty(values.shape, dtype=torch.float64).scatter_(1, order, by_rank.expand(values.shape))


def _merge(site: Site) -> Delta:
    kept = []
    for name, delta in zip(site.names, site.deltas, strict=True):
        values = delta.dense()
        chance = chances(values, site.options.drop, site.options.window)
        kept.append(dropped(values, chance, site.generator(name)))
    return Dense(agreed(weighted(kept, site.weights)))


RECORD = Method(
    name="della",
    description="small entries dropped more often than large ones, then the mean of those that agree in sign",
    formula="Δ = mean of agreeing λi mi ∘ Δi / (1 − pi), mi ~ Bernoulli(1 − pi), pi = p ± ε/2 by rank in the row",
    source="arXiv 2406.11617",
    merge=_merge,
    options=Options,
    random=True,
    one_stays={"drop": 0},
)
