"""RegMean: the Delta whose outputs are nearest to every adapter's on that adapter's own inputs (arXiv 2212.09849)."""

from dataclasses import dataclass

import torch

from mergekit_bert.adapters.delta import Delta, Dense, LowRank
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
    low = [delta for delta in site.weighted if isinstance(delta, LowRank)]
    if len(low) == len(grams):
        rows = torch.cat([delta.A.double() @ gram for delta, gram in zip(low, grams, strict=True)])
        return LowRank(torch.cat([delta.B.double() for delta in low], 1), torch.cholesky_solve(rows.T, total).T)
    dense = [delta.dense().double() @ gram for delta, gram in zip(site.weighted, grams, strict=True)]
    return Dense(torch.cholesky_solve(torch.stack(dense).sum(0).T, total).T)


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
