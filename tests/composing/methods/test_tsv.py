"""TSV-Merge against its definition by eigenvalues."""

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.delta import Dense, LowRank
from tests.composing.methods.sites import Array, arrays, low_rank, merge, root_polar, thin, trio


def reference(matrices: list[Array], counts: list[int]) -> Array:
    """Side by side, whitened by ``(MᵀM)^(-1/2)``, in dense float64."""
    parts = [thin(matrix) for matrix in matrices]
    left = np.concatenate([u[:, :k] for (u, _, _), k in zip(parts, counts, strict=True)], 1)
    right = np.concatenate([vh[:k].T for (_, _, vh), k in zip(parts, counts, strict=True)], 1)
    values = np.concatenate([s[:k] for (_, s, _), k in zip(parts, counts, strict=True)])
    return root_polar(left) @ np.diag(values) @ root_polar(right).T


@pytest.mark.parametrize(
    ("share", "counts"), [(1.0, [4, 3, 1]), (0.5, [2, 2, 1]), (0.25, [1, 1, 1]), (1 / 3, [2, 1, 1]), (0.01, [1, 1, 1])]
)
def test_it_is_the_whitened_side_by_side(share: float, counts: list[int]) -> None:
    deltas, weights = trio((4, 3, 1), (12, 10)), [1.0, -0.5, 2.0]
    found = merge("tsv", deltas, weights, share=share)
    np.testing.assert_allclose(found, reference(arrays(deltas, weights), counts), atol=1e-6)
    assert np.linalg.matrix_rank(found, rtol=1e-6) == sum(counts)


def test_a_share_of_zero_keeps_nothing() -> None:
    assert not merge("tsv", trio(), share=0.0).any()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_one_adapter_is_itself(rank: int) -> None:
    one = low_rank(0, rank)
    np.testing.assert_allclose(merge("tsv", [one], [-0.5]), arrays([one], [-0.5])[0], atol=1e-5)


def test_a_part_of_one_adapter_is_its_best_approximation() -> None:
    one = low_rank(0, 6)
    u, s, vh = thin(arrays([one])[0])
    np.testing.assert_allclose(merge("tsv", [one], share=0.5), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-6)


def test_adapters_that_do_not_meet_are_added() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    one, two = LowRank(basis[:, :2], 3 * basis[:2]), LowRank(basis[:, 2:5], 2 * basis[5:8])
    np.testing.assert_allclose(merge("tsv", [one, two]), sum(arrays([one, two])), atol=1e-6)


def test_the_same_adapter_twice_is_that_adapter_and_not_its_double() -> None:
    one = low_rank(0, 3)
    np.testing.assert_allclose(merge("tsv", [one, one]), arrays([one])[0], atol=1e-5)


def test_null_space_vectors_do_not_enter() -> None:
    """Whole columns of an SVD of a matrix of low rank, as the formula read literally takes them, bend the result."""
    deltas = [low_rank(0, 2, (6, 6)), low_rank(1, 2, (6, 6))]
    matrices = arrays(deltas)
    full = [np.linalg.svd(matrix) for matrix in matrices]
    literal_left = np.concatenate([u[:, :3] for u, _, _ in full], 1)
    literal_right = np.concatenate([vh[:3].T for _, _, vh in full], 1)
    values = np.concatenate([s[:3] for _, s, _ in full])
    literal = root_polar(literal_left) @ np.diag(values) @ root_polar(literal_right).T
    found = merge("tsv", [Dense(delta.dense()) for delta in deltas])
    np.testing.assert_allclose(found, reference(matrices, [2, 2]), atol=1e-6)
    assert np.abs(found - literal).max() > 0.05


def test_the_singular_values_of_all_are_those_of_the_merge() -> None:
    deltas = trio((2, 3, 1), (12, 10))
    expected = np.concatenate([thin(matrix)[1] for matrix in arrays(deltas)])
    found = np.linalg.svd(merge("tsv", deltas), compute_uv=False)[:6]
    np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-6)
