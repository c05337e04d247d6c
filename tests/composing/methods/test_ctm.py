"""Compress then merge: the rank by construction, the subspaces, and what merges inside them."""

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.delta import LowRank
from mergekit_bert.composing.methods.ctm import shared_subspaces
from tests.composing.methods.sites import Array, arrays, low_rank, merge, merge_delta, thin, trio

WEIGHTS = [1.0, -0.5, 2.0]


def tucker(matrices: list[Array], rank: int) -> tuple[Array, Array]:
    """HOSVD and many steps of HOOI on the dense matrices, by eigenvectors of Gram matrices."""

    def leading(gram: Array) -> Array:
        return np.linalg.eigh(gram)[1][:, ::-1][:, :rank]

    v = leading(sum(m.T @ m for m in matrices))
    for _ in range(3000):
        u = leading(sum(m @ v @ v.T @ m.T for m in matrices))
        v = leading(sum(m.T @ u @ u.T @ m for m in matrices))
    return u, v


def drawn_together(matrices: list[Array], beta: float) -> list[Array]:
    norms = [np.linalg.norm(matrix) for matrix in matrices]
    return [m / n * (beta * n + (1 - beta) * np.mean(norms)) for m, n in zip(matrices, norms, strict=True)]


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_sum_between_the_projectors_of_a_tucker_decomposition(rank: int, beta: float) -> None:
    deltas = trio((2, 3, 2))
    matrices = arrays(deltas, WEIGHTS)
    u, v = tucker(drawn_together(matrices, beta), rank)
    exact = u @ u.T @ sum(matrices) @ v @ v.T
    np.testing.assert_allclose(merge("ctm", deltas, WEIGHTS, rank=rank, beta=beta), exact, atol=5e-3)


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties", "tsv", "iso_c", "wudi"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_rank_is_that_by_construction(rank: int, inner: str) -> None:
    found = merge_delta("ctm", trio((2, 3, 2)), WEIGHTS, rank=rank, inner=inner)
    assert isinstance(found, LowRank)
    assert found.rank == rank
    assert found.dense().any()


def test_without_a_rank_it_is_the_largest_of_the_inputs() -> None:
    found = merge_delta("ctm", trio((2, 4, 1)))
    assert isinstance(found, LowRank)
    assert found.rank == 4


def test_room_for_all_loses_nothing() -> None:
    deltas = trio()
    np.testing.assert_allclose(merge("ctm", deltas, WEIGHTS, rank=99), sum(arrays(deltas, WEIGHTS)), atol=1e-5)


def test_one_adapter_is_itself_and_a_smaller_rank_its_best_approximation() -> None:
    one = low_rank(0, 5)
    np.testing.assert_allclose(merge("ctm", [one], [-0.5]), arrays([one], [-0.5])[0], atol=1e-5)
    u, s, vh = thin(arrays([one])[0])
    np.testing.assert_allclose(merge("ctm", [one], rank=2), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-6)


def test_without_norms_a_small_task_is_heard_as_much_as_a_large_one() -> None:
    rows = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    large = LowRank(rows[:, :2], 100 * torch.diag(torch.tensor([1.0, 0.9])) @ rows[:2])
    small = LowRank(rows[:, 2:4], torch.diag(torch.tensor([1.0, 0.1])) @ rows[2:4])
    kept = {beta: merge("ctm", [large, small], rank=2, beta=beta) for beta in (0.0, 1.0)}
    own = arrays([small])[0]
    share = {beta: float((found * own).sum() / (own * own).sum()) for beta, found in kept.items()}
    assert share[1.0] == pytest.approx(0, abs=1e-6)
    assert share[0.0] > 0.9


def test_hooi_only_gains_on_hosvd() -> None:
    slices = torch.randn(4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    u, v = shared_subspaces(slices, 2)
    first = [torch.linalg.svd(torch.cat(list(side), 1))[0][:, :2] for side in (slices, slices.mT)]
    energy = [float((left.T @ slices @ right).square().sum()) for left, right in ((u, v), (first[0], first[1]))]
    assert energy[0] > 1.01 * energy[1]
    for side in (u, v):
        np.testing.assert_allclose(side.T @ side, np.eye(2), atol=1e-12)


def test_the_inner_method_sees_the_coordinates_with_the_weights() -> None:
    """With one direction a Delta is one number, and TIES of numbers is plain to see."""
    column, row = low_rank(0, 1, (6, 1)), low_rank(1, 1, (1, 5))
    line = LowRank(column.dense(), row.dense())
    deltas = [line.scaled(size) for size in (1.0, 3.0, -2.0)]
    found = merge("ctm", deltas, [1.0, 1.0, 1.0], inner="ties")
    np.testing.assert_allclose(found, 2 * arrays([line])[0], atol=1e-5)  # the mean of 1 and 3; -2 is outvoted
    found = merge("ctm", deltas, [1.0, 1.0, 3.0], inner="ties")
    np.testing.assert_allclose(found, -6 * arrays([line])[0], atol=1e-5)
