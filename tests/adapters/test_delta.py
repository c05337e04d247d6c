"""The algebra of Deltas, against dense float64 arithmetic."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_bert.adapters.delta import (
    Delta,
    Dense,
    LowRank,
    add,
    apply,
    compress,
    delta_of,
    energy,
    factors,
    narrow,
    norm,
    tensor_shapes,
    zero,
)
from mergekit_bert.hardware import generator
from tests.adapters.helpers import quick

WEIGHTS = st.just(0.0) | st.floats(-3, 3)
SIDES = st.integers(1, 12)
RANKS = st.integers(1, 15)


def low_rank(out: int, width: int, rank: int, seed: int) -> LowRank:
    source = generator(seed)
    return LowRank(torch.randn(out, rank, generator=source), torch.randn(rank, width, generator=source))


@st.composite
def several(draw: st.DrawFn, dense: bool = False) -> tuple[list[Delta], list[float]]:
    """Deltas of one site, of any ranks, and a weight for each."""
    out, width, seed = draw(SIDES), draw(SIDES), draw(st.integers(0, 999))
    ranks = draw(st.lists(RANKS, min_size=1, max_size=5))
    deltas: list[Delta] = [low_rank(out, width, rank, seed + place) for place, rank in enumerate(ranks)]
    if dense:
        deltas = [Dense(one.dense()) if draw(st.booleans()) else one for one in deltas]
    return deltas, draw(st.lists(WEIGHTS, min_size=len(ranks), max_size=len(ranks)))


def dense64(delta: Delta) -> Tensor:
    return delta.B.double() @ delta.A.double() if isinstance(delta, LowRank) else delta.matrix.double()


def size64(deltas: Sequence[Delta]) -> float:
    """What rounding errors are measured against."""
    return 1 + sum(
        float((one.B.abs().double() @ one.A.abs().double()).max())
        if isinstance(one, LowRank)
        else float(one.matrix.abs().max())
        for one in deltas
    )


@quick
@given(several(dense=True))
def test_add_is_the_exact_dense_sum(drawn: tuple[list[Delta], list[float]]) -> None:
    deltas, weights = drawn
    exact = sum(weight * dense64(delta) for delta, weight in zip(deltas, weights, strict=True))
    before = [dense64(delta).clone() for delta in deltas]
    for total in (
        add(deltas, weights),
        add(delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)),
    ):
        assert total.shape == deltas[0].shape
        assert float((dense64(total) - exact).abs().max()) < 3e-6 * size64(deltas)
    assert all(torch.equal(dense64(delta), old) for delta, old in zip(deltas, before, strict=True))


@quick
@given(several())
def test_a_sum_of_factors_stays_in_factors_no_wider_than_the_matrix(drawn: tuple[list[Delta], list[float]]) -> None:
    deltas = drawn[0]
    total = add(deltas)
    assert isinstance(total, LowRank)
    assert total.rank == min(sum(one.rank for one in deltas if isinstance(one, LowRank)), *total.shape)


def test_a_narrow_sum_only_puts_factors_side_by_side() -> None:
    one, two = low_rank(9, 8, 2, 0), low_rank(9, 8, 3, 1)
    total = add([one, two])
    assert isinstance(total, LowRank)
    assert torch.equal(total.B, torch.cat([one.B, two.B], 1))
    assert torch.equal(total.A, torch.cat([one.A, two.A], 0))


def test_beyond_full_rank_a_sum_stays_exact() -> None:
    deltas = [low_rank(6, 5, 3, seed) for seed in range(20)]
    total = add(deltas)
    assert isinstance(total, LowRank)
    assert total.rank == 5
    np.testing.assert_allclose(dense64(total), sum(dense64(one) for one in deltas), atol=1e-4, rtol=1e-5)


def test_averaging_the_factors_apart_would_be_something_else() -> None:
    one, two = low_rank(6, 5, 2, 0), low_rank(6, 5, 2, 1)
    mean = (dense64(one) + dense64(two)) / 2
    apart = LowRank((one.B + two.B) / 2, (one.A + two.A) / 2)
    np.testing.assert_allclose(dense64(add([one.scaled(0.5), two.scaled(0.5)])), mean, atol=1e-6)
    assert float((dense64(apart) - mean).abs().max()) > 0.1


@quick
@given(SIDES, SIDES, RANKS, WEIGHTS)
def test_a_weight_counts_once_and_keeps_its_sign(out: int, width: int, rank: int, weight: float) -> None:
    factors = low_rank(out, width, rank, 7)
    for delta in (factors, Dense(factors.dense())):
        np.testing.assert_allclose(dense64(delta.scaled(weight)), weight * dense64(delta), atol=1e-4, rtol=1e-5)
        assert delta.scaled(weight).shape == delta.shape == (out, width)


@quick
@given(SIDES, SIDES, RANKS, st.integers(0, 16), st.booleans())
def test_compress_loses_what_a_truncated_svd_loses(out: int, width: int, rank: int, kept: int, dense: bool) -> None:
    factors = low_rank(out, width, rank, 3)
    delta = Dense(factors.dense()) if dense else factors
    values = np.linalg.svd(dense64(delta).numpy(), compute_uv=False)
    best = np.sqrt((values[kept:] ** 2).sum())
    found, lost = compress(delta, kept)
    error = float(torch.linalg.matrix_norm(dense64(found) - dense64(delta)))
    assert found.rank <= kept
    assert error == pytest.approx(best, abs=1e-5 * (1 + values[0]))
    assert lost == pytest.approx((values[kept:] ** 2).sum() / (values**2).sum(), abs=1e-9)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("out", "width"), [(40, 25), (25, 40)])
@pytest.mark.parametrize("kept", [1, 4, 12, 24])
def test_compress_is_the_best_down_a_steep_spectrum(out: int, width: int, kept: int, dense: bool) -> None:
    source = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(side, 25, generator=source, dtype=torch.float64))[0] for side in (out, width)
    )
    values = 10 ** -torch.linspace(0, 5, 25, dtype=torch.float64)
    delta = Dense((left * values) @ right.T) if dense else LowRank(left * values, right.T)
    found, lost = compress(delta, kept)
    best = values[kept:].square().sum()
    assert lost == pytest.approx(float(best / values.square().sum()), rel=1e-3, abs=1e-13)
    error = (found.dense() - delta.dense()).square().sum()
    assert float(error) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("kept", [2, 3, 6])
def test_factors_wider_than_their_rank_are_compressed_without_loss(kept: int) -> None:
    one = low_rank(9, 8, 2, 0)
    wide = LowRank(torch.cat([one.B, 2 * one.B, -one.B], 1), torch.cat([one.A, one.A, one.A]))
    found, lost = compress(wide, kept)
    assert lost < 1e-12
    np.testing.assert_allclose(dense64(found), 2 * dense64(one), atol=1e-5)


@pytest.mark.parametrize("delta", [LowRank(torch.zeros(4, 2), torch.ones(2, 3)), Dense(torch.zeros(4, 3))])
def test_a_zero_delta_compresses_to_zero_and_loses_nothing(delta: Delta) -> None:
    found, lost = compress(delta, 1)
    assert lost == 0
    assert found.shape == (4, 3)
    assert torch.equal(found.dense(), torch.zeros(4, 3))
    assert norm(delta) == norm(found) == 0


def test_a_sum_of_opposites_is_zero() -> None:
    one = low_rank(5, 4, 3, 0)
    total = add([one, one.scaled(-1.0)])
    assert float(total.dense().abs().max()) < 1e-6
    assert norm(total) < 1e-5


@quick
@given(SIDES, SIDES, RANKS)
def test_the_norm_of_factors_is_that_of_the_matrix(out: int, width: int, rank: int) -> None:
    delta = low_rank(out, width, rank, 5)
    expected = np.linalg.norm(dense64(delta).numpy())
    assert norm(delta) == pytest.approx(expected, rel=1e-9)
    assert norm(Dense(delta.dense())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_bfloat16_weight_is_added_to_in_float32_and_cast_once(dense: bool) -> None:
    weight = torch.randn(20, 16, generator=generator(0)).bfloat16()
    factors = low_rank(20, 16, 2, 1).scaled(1e-3)
    delta = Dense(factors.dense()) if dense else factors
    found = apply(weight, delta)
    exact = weight.double() + dense64(delta)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, exact, atol=1e-6)
    assert torch.equal(found.bfloat16(), exact.float().bfloat16())
    in_bfloat16 = weight + factors.dense().bfloat16()
    assert float((in_bfloat16.double() - exact).abs().max()) > 1e-4


def test_a_float64_weight_stays_float64() -> None:
    delta = low_rank(3, 4, 2, 0)
    weight = torch.zeros(3, 4, dtype=torch.float64)
    found = apply(weight, delta)
    assert found.dtype == torch.float64
    assert torch.equal(weight, torch.zeros(3, 4, dtype=torch.float64))
    np.testing.assert_allclose(found, dense64(delta), atol=1e-6)


@quick
@given(SIDES, SIDES, RANKS, st.booleans())
def test_both_kinds_answer_alike(out: int, width: int, rank: int, dense: bool) -> None:
    low = low_rank(out, width, rank, 3)
    delta: Delta = Dense(low.dense()) if dense else low
    exact, source = dense64(delta), generator(4)
    scale = 1e-4 * size64([delta]) * (1 + out + width)

    assert delta.shape == (out, width)
    assert delta.rank == (None if dense else rank)
    assert {name: tuple(one.shape) for name, one in delta.tensors().items()} == tensor_shapes(delta.shape, delta.rank)
    assert torch.equal(delta_of(delta.tensors()).dense(), delta.dense())
    assert type(delta_of(delta.tensors())) is type(delta)
    assert delta.to(torch.float64).dtype == torch.float64

    both = factors(delta)
    np.testing.assert_allclose(both.B.double() @ both.A.double(), exact, atol=scale)
    assert both is delta or both.rank == min(out, width)
    np.testing.assert_allclose(dense64(narrow(delta)), exact, atol=scale)
    assert (narrow(delta).rank or 0) <= min(out, width)

    left, right = torch.randn(5, out, generator=source), torch.randn(width, 4, generator=source)
    np.testing.assert_allclose(dense64(delta.left(lambda rows: left @ rows)), left.double() @ exact, atol=5 * scale)
    turned = delta.right(lambda columns: columns @ right)
    np.testing.assert_allclose(dense64(turned), exact @ right.double(), atol=5 * scale)

    x, before = torch.randn(6, width, generator=source), torch.randn(6, out, generator=source)
    after = before.clone()
    delta.add_output(after, x)
    np.testing.assert_allclose(after, before.double() + x.double() @ exact.T, atol=5 * scale)
    moments = x.double().T @ x.double()
    assert energy(delta, moments) == pytest.approx(float((x.double() @ exact.T).square().sum()), rel=1e-6)

    reads = torch.linalg.pinv(delta.reads.double()) @ delta.reads.double()
    np.testing.assert_allclose(exact @ reads, exact, atol=5 * scale)


def test_no_change_has_rank_0_and_adds_nothing() -> None:
    none = zero((3, 5))
    assert (none.shape, none.rank, norm(none)) == ((3, 5), 0, 0.0)
    one = low_rank(3, 5, 2, 0)
    assert torch.equal(add([none, one]).dense(), one.dense())
