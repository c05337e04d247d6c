"""WUDI-Merging: the Delta that, on every task's own input directions, answers as that task's does (Cheng et al. 2025).

arXiv 2503.08099: ``min Σ ‖(Δ − Δi) Δiᵀ‖² / ‖Δi‖²``. The rows of ``Δi`` stand for the inputs that it was
trained on. The paper takes some hundred steps of Adam from ``Σ Δi``. The problem is linear least squares, and both
that start and the gradients lie in the common row space, so the steps tend to its solution of least norm, which is
computed here. With ``Mi = Vi Si / ‖Si‖`` the objective is ``Σ ‖Δ Mi − Δi Mi‖²``, so ``Δ = [Δ1 M1 | …] [M1 | …]⁺``: no
matrix is squared. ``Mi`` does not know the size of ``λi``: a weight scales what a task asks for, not how much it is
heard, and a weight of 0 leaves it out.
"""

import torch

from mergekit_bert.adapters.delta import Delta, Dense, LowRank, svd
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spectral import spectra


def _merge(site: Site) -> Delta:
    parts = spectra(site)
    inputs = torch.cat([vh.T * (values / values.norm()) for _, values, vh in parts], 1)
    answers = torch.cat([u * (values.square() / values.norm()) for u, values, _ in parts], 1)
    left, size, right = svd(Dense(inputs))
    return LowRank(answers @ (right.T / size), left.T)


RECORD = Method(
    name="wudi",
    description="least interference along each task's own input directions",
    formula="Δ = argmin Σ ‖(Δ − λi Δi) Δiᵀ‖² / ‖Δi‖², that of least norm",
    source="arXiv 2503.08099",
    merge=_merge,
)
