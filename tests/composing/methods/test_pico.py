"""Pico against its formula on the adapters' own factors, around several methods."""

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.delta import Delta, LowRank
from tests.composing.methods.sites import Array, arrays, low_rank, merge, trio

WEIGHTS = [1.0, -0.5, 2.0]


def calibrated(columns: list[Array], matrices: list[Array]) -> list[Array]:
    """``S Δi``, ``S = I + U diag(α − 1) Uᵀ``, of the SVD of the columns side by side."""
    u, s, _ = np.linalg.svd(np.concatenate(columns, 1), full_matrices=False)
    alpha = 1 / (1 + (len(columns) - 1) * s**2 / (s**2).sum())
    change = np.eye(len(u)) + u @ np.diag(alpha - 1) @ u.T
    return [change @ matrix for matrix in matrices]


def rescaled(merged: Array, matrices: list[Array]) -> Array:
    return merged * np.mean([np.linalg.norm(matrix) for matrix in matrices]) / np.linalg.norm(merged)


def on_orthonormal_rows(ranks: tuple[int, ...]) -> list[LowRank]:
    """As adapters trained on an orthogonal basis are: ``B`` is free, the rows of ``A`` are orthonormal."""
    made = []
    for place, rank in enumerate(ranks):
        rows = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(place)))[0][:rank]
        made.append(LowRank(low_rank(place, rank, (12, 10)).B, rows))
    return made


def test_with_orthonormal_rows_it_is_the_papers_formula_of_the_trained_factors() -> None:
    deltas = on_orthonormal_rows((2, 3, 4))
    matrices = arrays(deltas)
    exact = rescaled(sum(calibrated([delta.B.double().numpy() for delta in deltas], matrices)), matrices)
    np.testing.assert_allclose(merge("pico", deltas), exact, atol=1e-6)


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties", "tsv", "iso_c", "wudi"])
def test_around_any_method_it_is_calibrate_merge_rescale(inner: str) -> None:
    deltas = trio()
    asked = arrays(deltas, WEIGHTS)
    inside: list[Delta] = []
    for matrix in calibrated(asked, arrays(deltas)):
        u, s, vh = np.linalg.svd(matrix)
        rank = int((s > 1e-6 * s[0]).sum())
        inside.append(LowRank(torch.from_numpy(u[:, :rank] * s[:rank]), torch.from_numpy(vh[:rank])))
    merged = merge(inner, inside, WEIGHTS)
    np.testing.assert_allclose(merge("pico", deltas, WEIGHTS, inner=inner), rescaled(merged, asked), atol=1e-5)


def test_a_direction_that_all_share_loses_against_one_that_is_a_tasks_own() -> None:
    out = torch.eye(5)
    deltas = [LowRank(torch.stack([2 * out[0], out[1 + place]], 1), low_rank(place, 2, (2, 6)).A) for place in range(3)]
    found, plain = merge("pico", deltas), sum(arrays(deltas))
    shares = [np.linalg.norm(matrix[0]) / np.linalg.norm(matrix) for matrix in (found, plain)]
    assert shares[0] < 0.8 * shares[1]


def test_the_result_has_the_mean_norm_of_what_goes_in() -> None:
    for inner in ("task_arithmetic", "ties", "iso_c"):
        found = merge("pico", trio(), WEIGHTS, inner=inner)
        mean = np.mean([np.linalg.norm(matrix) for matrix in arrays(trio(), WEIGHTS)])
        assert np.linalg.norm(found) == pytest.approx(mean, rel=1e-5)


def test_one_adapter_is_itself() -> None:
    one = low_rank(0, 5)
    np.testing.assert_allclose(merge("pico", [one], [-0.5]), arrays([one], [-0.5])[0], atol=1e-5)
