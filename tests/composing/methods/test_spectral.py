"""What all spectral methods keep to: spaces, weights, order, zeros, small tensors, and no dense matrix."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bert.adapters.delta import Delta, Dense, LowRank, svd
from mergekit_bert.composing.spectral import polar
from tests.adapters.helpers import quick
from tests.composing.methods.sites import Array, arrays, dense, low_rank, merge, merge_delta, root_polar, trio, zero

METHODS = ["tsv", "iso_c", "iso_cts", "ctm", "pico", "wudi"]
WEIGHTS = [0.5, -1.0, 2.0]

each = pytest.mark.parametrize("method", METHODS)


def close(one: Array, two: Array, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(one, two, atol=tolerance * max(1.0, float(np.abs(two).max(initial=0))))


@each
@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("shape", [(9, 7), (5, 12), (4, 4)])
def test_every_space_gives_the_same(method: str, space: str, shape: tuple[int, int]) -> None:
    deltas = trio((2, 3, 1), shape)
    close(merge(method, deltas, WEIGHTS, space), merge(method, deltas, WEIGHTS), 1e-5)


@quick
@given(
    method=st.sampled_from(METHODS),
    factor=st.sampled_from([-3.0, -1.0, 0.25, 7.0]),
    ranks=st.tuples(*[st.integers(0, 5)] * 3).filter(any),
    weights=st.tuples(*[st.floats(-2, 2).filter(lambda w: abs(w) > 0.05)] * 3),
)
def test_weights_times_a_number_give_the_result_times_it(
    method: str, factor: float, ranks: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    deltas = trio(ranks)
    once = merge(method, deltas, weights)
    close(merge(method, deltas, [factor * weight for weight in weights]), factor * once, 1e-5)


@each
def test_the_order_does_not_matter(method: str) -> None:
    pairs = list(zip(trio(), WEIGHTS, strict=True))
    first = merge(method, [delta for delta, _ in pairs], [weight for _, weight in pairs])
    for order in itertools.permutations(pairs):
        close(merge(method, [delta for delta, _ in order], [weight for _, weight in order]), first)


@each
def test_a_zero_delta_and_a_zero_weight_are_as_if_left_out(method: str) -> None:
    deltas = trio()[:2]
    alone = merge(method, deltas)
    for more, weight in ((zero(), 1.0), (zero(rank=2), 1.0), (low_rank(7, 3), 0.0)):
        close(merge(method, [*deltas, more], [1.0, 1.0, weight]), alone)
        close(merge(method, [more, *deltas], [weight, 1.0, 1.0]), alone)


@each
@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_zeros_merge_to_zero(method: str, space: str) -> None:
    for deltas in ([zero()], [zero(), zero(rank=2)], [Dense(torch.zeros(9, 7)), zero()]):
        found = merge(method, deltas, space=space)
        assert found.shape == (9, 7)
        assert not found.any()
    assert not merge(method, trio(), [0.0, 0.0, 0.0], space).any()


@each
def test_what_cancels_leaves_nothing(method: str) -> None:
    one, two = low_rank(0, 3), low_rank(1, 2)
    close(merge(method, [one, one], [1.0, -1.0]), np.zeros((9, 7)))
    # In binary these do not cancel to the last bit.
    close(merge(method, [one, two, one, two], [0.1, 0.7, -0.1, -0.7]), np.zeros((9, 7)))


@each
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_small_tensors(method: str, shape: tuple[int, int]) -> None:
    one, two = low_rank(0, 1, shape), low_rank(1, 1, shape)
    for deltas in ([one], [one, two], [one, two, Dense(two.dense())]):
        found = merge(method, deltas)
        assert found.shape == shape
        assert np.isfinite(found).all()
        assert found.any()
    close(merge(method, [one]), arrays([one])[0])  # rank 1: even a flat spectrum is its own


@each
def test_dense_deltas_are_merged_as_their_factors_are(method: str) -> None:
    close(merge(method, dense(trio()), WEIGHTS), merge(method, trio(), WEIGHTS), 1e-5)
    mixed = [trio()[0], *dense(trio())[1:]]
    close(merge(method, mixed, WEIGHTS), merge(method, trio(), WEIGHTS), 1e-5)


@each
def test_factors_that_are_not_independent_are_merged_as_their_product_is(method: str) -> None:
    deltas = trio()
    repeated: list[Delta] = []
    for delta in deltas:
        assert isinstance(delta, LowRank)
        repeated.append(LowRank(torch.cat([delta.B, delta.B], 1), torch.cat([0.75 * delta.A, 0.25 * delta.A], 0)))
    close(merge(method, repeated), merge(method, deltas), 1e-5)


@each
def test_factors_are_never_multiplied_out(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = trio(shape=(300, 200))

    def refuse(self: LowRank) -> torch.Tensor:
        raise AssertionError("a dense matrix was made of factors")

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "dense", refuse)
        found = merge_delta(method, deltas)
    assert isinstance(found, LowRank)
    assert found.rank <= 6
    assert found.dense().any()


@each
@pytest.mark.parametrize("ranks", [(5, 5, 5), (7, 2, 4)])
def test_more_directions_than_the_matrix_has(method: str, ranks: tuple[int, ...]) -> None:
    deltas = trio(ranks)
    found = merge(method, deltas, WEIGHTS)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) < 2 * sum(map(np.linalg.norm, arrays(deltas, WEIGHTS)))
    close(merge(method, deltas, WEIGHTS, "core"), found, 1e-5)


@quick
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_the_polar_factor_is_that_of_eigenvalues(seed: int, rows: int, columns: int, rank: int) -> None:
    matrix = low_rank(seed, rank, (rows, columns)).dense().double()
    found = polar(matrix)
    close(found.numpy(), root_polar(matrix.numpy()), 1e-5)
    values = np.linalg.svd(found.numpy(), compute_uv=False)
    close(values * (1 - values), np.zeros_like(values))


def test_what_a_cancellation_left_is_no_direction() -> None:
    rounding = Dense(1e-16 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert len(svd(rounding)[1]) == 4
    assert len(svd(rounding, 1.0)[1]) == 0
