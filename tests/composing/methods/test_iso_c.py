"""Iso-C: the sum with a flat spectrum, over the numerical rank only."""

import numpy as np
import pytest

from mergekit_bert.adapters.delta import Delta
from tests.composing.methods.sites import arrays, dense, low_rank, merge, root_polar, thin, trio

WEIGHTS = [1.0, -0.5, 2.0]


@pytest.mark.parametrize("shape", [(12, 10), (9, 7), (3, 5)])
def test_it_is_the_polar_factor_of_the_sum_times_the_mean(shape: tuple[int, int]) -> None:
    deltas = trio((2, 3, 1), shape)
    total = sum(arrays(deltas, WEIGHTS))
    _, values, _ = thin(total)
    np.testing.assert_allclose(merge("iso_c", deltas, WEIGHTS), values.mean() * root_polar(total), atol=1e-6)


@pytest.mark.parametrize("as_matrices", [False, True])
def test_no_direction_outside_the_sum_is_raised(as_matrices: bool) -> None:
    deltas: list[Delta] = trio((2, 3, 1), (12, 10))
    total = sum(arrays(deltas))
    found = merge("iso_c", dense(deltas) if as_matrices else deltas)
    u, values, vh = thin(total)
    assert len(values) == 6
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), [values.mean()] * 6 + [0] * 4, atol=1e-6)
    np.testing.assert_allclose(u @ (u.T @ found), found, atol=1e-6)
    np.testing.assert_allclose(found @ vh.T @ vh, found, atol=1e-6)


def test_the_nuclear_norm_of_the_sum_is_kept() -> None:
    deltas = trio()
    norms = [np.linalg.svd(matrix, compute_uv=False).sum() for matrix in (sum(arrays(deltas)), merge("iso_c", deltas))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_direction_that_cancels_is_not_raised() -> None:
    same, other = low_rank(0, 2), low_rank(1, 1)
    found = merge("iso_c", [same, other, same], [1.0, 1.0, -1.0])
    np.testing.assert_allclose(found, arrays([other])[0], atol=1e-6)
