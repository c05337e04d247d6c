"""RegMean: the Delta whose outputs are nearest to every adapter's on that adapter's own inputs (arXiv 2212.09849)."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, add
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """``shrink`` is the paper's α."""

    shrink: float = option(0.9, "Factor before the off-diagonal entries of every Gram matrix.", low=0, high=1)
    ridge: float = option(
        1e-6, "Share of the mean diagonal added to every Gram matrix; where no input lies, the mean.", low=1e-9
    )


def _merge(site: Site) -> Delta:
    """``Δ = Σ λi Δi Gi (Σ Gi)⁻¹``, the minimum of ``Σ E ‖(Δ − λi Δi) xi‖²``.

    The weights scale the Deltas and stay out of ``Σ Gi``, so that the merge is linear in them; the authors' code lets
    them scale the ``Gi``, where only their shares count. The ridge is the same for all ``Gi`` and thus draws towards
    the mean, never towards zero. Of factors, ``[λ1 B1 | …] @ [A1 G1 ; …] (Σ Gi)⁻¹``: the columns stay those of the
    ``Bi``.
    """
    shrink = site.options.shrink
    grams = [one["gram"].dense() for one in site.statistics]
    grams = [shrink * gram + (1 - shrink) * gram.diagonal().diag() for gram in grams]
    level = float(torch.stack([gram.diagonal() for gram in grams]).mean())
    ridge = site.options.ridge * level or 1.0
    grams = [gram + ridge * torch.eye(len(gram), dtype=gram.dtype) for gram in grams]
    total = torch.linalg.cholesky(torch.stack(grams).sum(0))
    pairs = zip(site.weighted, grams, strict=True)
    parts = [delta.to(torch.float64).right(partial(_times, gram)) for delta, gram in pairs]
    return add(parts).right(lambda rows: torch.cholesky_solve(rows.T, total).T)


def _times(gram: Float[Tensor, "in in"], rows: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
    return rows @ gram


RECORD = Method(
    name="regmean",
    description="least squares to the outputs of every adapter on its own inputs",
    formula="Δ = Σ λi Δi Gi (Σ Gi)⁻¹, Gi = E[x xᵀ]",
    source="arXiv 2212.09849",
    merge=_merge,
    options=Options,
    needs=("gram",),
    spaces=("full",),
)
