"""Iso-CTS against its definition in dense float64, and its bounds."""

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.delta import LowRank
from tests.composing.methods.sites import Array, arrays, low_rank, merge, root_polar, thin, trio

WEIGHTS = [1.0, -0.5, 2.0]


def reference(matrices: list[Array], shared: int, each: int) -> Array:
    """``shared`` directions of the sum and up to ``each`` of every residual, dense and in a loop."""
    u, s, vh = thin(sum(matrices))
    left, values, right = [u[:, :shared]], [s[:shared]], [vh[:shared].T]
    for matrix in matrices:
        residual = matrix - u[:, :shared] @ u[:, :shared].T @ matrix
        own_u, own_s, own_vh = np.linalg.svd(residual)
        count = min(each, int((own_s > 1e-6 * np.linalg.norm(matrix)).sum()))
        left.append(own_u[:, :count])
        values.append(own_s[:count])
        right.append(own_vh[:count].T)
    sides = root_polar(np.concatenate(left, 1)), root_polar(np.concatenate(right, 1))
    return np.concatenate(values).mean() * sides[0] @ sides[1].T


@pytest.mark.parametrize(
    ("common", "shared", "each"),
    [(0.8, 12, 0), (0.75, 9, 1), (0.5, 6, 2), (0.4, 6, 2), (0.25, 3, 3), (0.0, 0, 4), (1.0, 12, 0)],
)
def test_it_is_the_definition(common: float, shared: int, each: int) -> None:
    deltas = trio((5, 4, 3), (16, 15))
    found = merge("iso_cts", deltas, WEIGHTS, common=common)
    np.testing.assert_allclose(found, reference(arrays(deltas, WEIGHTS), shared, each), atol=1e-6)


def test_the_directions_fill_the_rank_of_the_sum() -> None:
    deltas = trio((7, 6, 7), (20, 20))
    for common in (0.0, 0.33, 0.8, 1.0):
        found = merge("iso_cts", deltas, common=common)
        values = np.linalg.svd(found, compute_uv=False)
        np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_all_in_common_is_iso_c() -> None:
    deltas = trio()
    np.testing.assert_allclose(merge("iso_cts", deltas, common=1.0), merge("iso_c", deltas), atol=1e-6)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
def test_so_it_is_of_one_adapter(common: float) -> None:
    one = low_rank(0, 6)
    np.testing.assert_allclose(merge("iso_cts", [one], common=common), merge("iso_c", [one]), atol=1e-6)


def test_a_task_within_the_common_directions_adds_none() -> None:
    """Its residual is rounding, which has directions of its own if looked at alone."""
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    strong = LowRank(basis[:, :1], 9 * basis[:1])
    weak = LowRank(basis[:, 1:4], torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ basis[1:4])
    found = merge("iso_cts", [strong, weak], common=0.5)
    # The sum has 9, 3, 2, 1; two are common, so each may add one: the strong task has none left.
    exact = (9 + 3 + 2) / 3 * (basis[:, :3] @ basis[:3]).double().numpy()
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_where_all_cancels_rounding_makes_no_room_for_directions() -> None:
    one, two = low_rank(0, 3), low_rank(1, 2)
    found = merge("iso_cts", [one, two, one, two], [0.1, 0.7, -0.1, -0.7], common=0.0)
    np.testing.assert_allclose(found, np.zeros((9, 7)), atol=1e-6)
