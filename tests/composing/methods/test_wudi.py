"""WUDI: the closed form is where gradient descent on the objective goes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, LowRank
from tests.composing.methods.sites import Array, arrays, low_rank, merge, trio

WEIGHTS = [1.0, -0.5, 2.0]


def objective(delta: Tensor, asked: Tensor, own: Tensor) -> Tensor:
    """``Σ ‖(Δ − λi Δi) Δiᵀ‖² / ‖Δi‖²``, of stacked ``λi Δi`` and ``Δi``."""
    return (((delta - asked) @ own.mT).square().sum((1, 2)) / own.square().sum((1, 2))).sum()


def stacked(deltas: Sequence[Delta], weights: list[float] | None = None) -> Tensor:
    return torch.from_numpy(np.stack(arrays(deltas, weights)))


@pytest.mark.parametrize(("start", "weights"), [(0, WEIGHTS), (1, WEIGHTS), (1, [1.0, 1.0, 1.0])])
def test_gradient_descent_tends_to_it(start: int, weights: list[float]) -> None:
    """From zero, and from the sum as the paper has it."""
    deltas = trio((1, 2, 1))
    asked, own = stacked(deltas, weights), stacked(deltas)
    curvature = (own.mT @ own / own.square().sum((1, 2), keepdim=True)).sum(0)
    step = 1 / (2 * torch.linalg.matrix_norm(curvature, 2))
    delta = start * asked.sum(0)
    for _ in range(2000):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(objective(delta, asked, own), delta)
        delta = (delta - step * slope).detach()
    np.testing.assert_allclose(merge("wudi", deltas, weights), delta, atol=1e-4)


def normal_equations(deltas: list[Delta], weights: list[float]) -> Array:
    """``(Σ λi Δi Gi) (Σ Gi)⁺`` with ``Gi = Δiᵀ Δi / ‖Δi‖²``."""
    own, asked = arrays(deltas), arrays(deltas, weights)
    grams = [matrix.T @ matrix / np.square(matrix).sum() for matrix in own]
    right = sum(matrix @ gram for matrix, gram in zip(asked, grams, strict=True))
    return right @ np.linalg.pinv(sum(grams), rtol=1e-10)


@pytest.mark.parametrize("ranks", [(2, 3, 1), (1, 1, 1), (4, 4, 4), (7, 7, 7)])
def test_it_solves_the_normal_equations(ranks: tuple[int, ...]) -> None:
    deltas = trio(ranks)
    np.testing.assert_allclose(merge("wudi", deltas, WEIGHTS), normal_equations(deltas, WEIGHTS), atol=1e-5)


def test_no_other_delta_does_better_and_no_equal_one_is_smaller() -> None:
    deltas = trio((2, 2, 1))
    asked, own = stacked(deltas, WEIGHTS), stacked(deltas)
    best = torch.from_numpy(merge("wudi", deltas, WEIGHTS))
    least = float(objective(best, asked, own))
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        change = 0.1 * torch.randn(9, 7, dtype=torch.float64, generator=source)
        assert float(objective(best + change, asked, own)) > least
        outside = change - change @ torch.linalg.pinv(own.flatten(0, 1)) @ own.flatten(0, 1)
        assert float(objective(best + outside, asked, own)) == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert float((best + outside).norm()) > float(best.norm())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_one_adapter_is_itself(rank: int) -> None:
    one = low_rank(0, rank)
    np.testing.assert_allclose(merge("wudi", [one], [-0.5]), arrays([one], [-0.5])[0], atol=1e-5)


def test_adapters_with_orthogonal_inputs_are_added() -> None:
    rows = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
    one, two = LowRank(low_rank(0, 2).B, rows[:2]), LowRank(low_rank(1, 3).B, rows[2:5])
    np.testing.assert_allclose(merge("wudi", [one, two]), sum(arrays([one, two])), atol=1e-5)


def test_it_is_linear_in_the_weights() -> None:
    deltas = trio()
    parts = [merge("wudi", deltas, weights) for weights in (WEIGHTS, [0.3, 0.7, -0.2], [1.3, 0.2, 1.8])]
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], atol=1e-5)
