"""DARE: drop entries at random, scale the rest up so that the mean stays, then merge (Yu et al. 2023).

arXiv 2311.03099: ``δ̃ = (1 − m) ∘ δ / (1 − p)`` with ``m ~ Bernoulli(p)``. Dropping is a step before a
merge, here a weighted sum or TIES (with its trimming, as the authors' own code has it).
"""

import math
from dataclasses import dataclass

from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.composing.entrywise import agreed, dropped, portion, trimmed, weighted
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.methods import task_arithmetic
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How much is dropped, and what comes then."""

    drop: float = option(0.2, "chance of an entry to be dropped", low=0.0, high=1.0)
    then: str = option("linear", "how the rest is merged (ties: with weights of about 1)", choices=("linear", "ties"))
    density: float = option(0.2, "share of entries that ties keeps, rounded up", low=0.0, high=1.0)


def _merge(site: Site) -> Delta:
    options = site.options
    kept = [
        dropped(delta.dense(), options.drop, site.generator(name))
        for name, delta in zip(site.names, site.deltas, strict=True)
    ]
    if options.then == "linear":
        return Dense(weighted(kept, site.weights).sum(0))
    kept = [trimmed(values, math.ceil(portion(options.density, values.numel()))) for values in kept]
    return Dense(agreed(weighted(kept, site.weights)))


RECORD = Method(
    name="dare",
    description="entries dropped at random and the rest scaled up, then summed or merged by ties",
    formula="Δ = Σ λi mi ∘ Δi / (1 − p), mi ~ Bernoulli(1 − p)",
    source="arXiv 2311.03099",
    merge=_merge,
    weights=task_arithmetic.RECORD.weights,
    default_weights=task_arithmetic.RECORD.default_weights,
    options=Options,
    random=True,
    one_stays={"drop": 0},
)
