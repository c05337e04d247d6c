"""RegMean: against least squares on the inputs themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense, LowRank
from mergekit_bert.adapters.statistics import Gram
from mergekit_bert.composing.method import METHODS, Site, make_options
from mergekit_bert.hardware import generator
from tests.composing.methods.sites import low_rank, trio

SHAPE = (9, 7)
LEAST: dict[str, Any] = {"shrink": 1.0, "ridge": 1e-9}


def inputs(seed: int, count: int = 40) -> Tensor:
    """Inputs of the site whose features differ in size and go together."""
    source = generator(seed, 5)
    mix = torch.randn(SHAPE[1], SHAPE[1], generator=source, dtype=torch.float64)
    return torch.randn(count, SHAPE[1], generator=source, dtype=torch.float64) @ mix


def gram(x: Tensor) -> Gram:
    return Gram.of(x.T @ x / len(x), len(x), SHAPE[1])


def regmean(deltas: Sequence[Delta], grams: Sequence[Gram], weights: Sequence[float] = (), **options: Any) -> Delta:
    record = METHODS.get("regmean")
    return record.merge(
        Site(
            name="layer",
            names=[f"t{place}" for place in range(len(deltas))],
            deltas=deltas,
            weights=list(weights) or [1.0] * len(deltas),
            options=make_options(record, options),
            statistics=[{"gram": one} for one in grams],
        )
    )


def array(delta: Delta) -> NDArray[np.float64]:
    return delta.dense().double().numpy()


@pytest.mark.parametrize("weights", [(), (0.5, -1.0, 2.0)])
def test_it_is_the_least_squares_fit_to_all_outputs(weights: tuple[float, ...]) -> None:
    deltas, xs = trio(), [inputs(seed, 30 + 10 * seed) for seed in range(3)]
    own = [weight * array(delta) for weight, delta in zip(weights or (1.0, 1.0, 1.0), deltas, strict=True)]
    left = np.concatenate([x.numpy() / len(x) ** 0.5 for x in xs])
    right = np.concatenate([x.numpy() @ delta.T / len(x) ** 0.5 for x, delta in zip(xs, own, strict=True)])
    exact = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = array(regmean(deltas, [gram(x) for x in xs], weights, **LEAST))
    np.testing.assert_allclose(found, exact, atol=1e-4)
    assert np.abs(found - sum(own) / 3).max() > 0.1, "and it is not the mean"


def test_factors_give_factors_whose_columns_are_the_inputs_columns() -> None:
    deltas, grams = trio(), [gram(inputs(seed)) for seed in range(3)]
    found = regmean(deltas, grams, (1.0, 2.0, -0.5))
    assert isinstance(found, LowRank)
    assert found.rank == 6
    whole = regmean([Dense(delta.dense()) for delta in deltas], grams, (1.0, 2.0, -0.5))
    assert isinstance(whole, Dense)
    np.testing.assert_allclose(array(found), array(whole), atol=1e-5)
    mixed = regmean([deltas[0], Dense(deltas[1].dense()), deltas[2]], grams, (1.0, 2.0, -0.5))
    np.testing.assert_allclose(array(mixed), array(whole), atol=1e-5)


@pytest.mark.parametrize("options", [{}, LEAST, {"shrink": 0.0, "ridge": 10.0}])
def test_one_task_gives_itself_and_equal_inputs_give_the_mean(options: dict[str, float]) -> None:
    deltas, one = trio(), gram(inputs(1, 4))  # fewer inputs than features: the Gram matrix is singular
    np.testing.assert_allclose(array(regmean(deltas[:1], [one], (-3.0,), **options)), -3 * array(deltas[0]), atol=1e-4)
    mean = sum(map(array, deltas)) / 3
    np.testing.assert_allclose(array(regmean(deltas, [one] * 3, **options)), mean, atol=1e-4)


def test_diagonals_alone_weigh_each_column_by_itself() -> None:
    deltas, xs = trio(), [inputs(seed) for seed in range(3)]
    shares = np.stack([x.square().mean(0).numpy() for x in xs])
    exact = sum(share * array(delta) for share, delta in zip(shares / shares.sum(0), deltas, strict=True))
    found = array(regmean(deltas, [gram(x) for x in xs], shrink=0.0, ridge=1e-9))
    np.testing.assert_allclose(found, exact, atol=1e-4)


def test_shrinking_scales_what_is_off_the_diagonal() -> None:
    deltas, xs = trio(), [inputs(seed) for seed in range(3)]
    moments = [(x.T @ x / len(x)).numpy() for x in xs]
    shrunk = [0.9 * one + 0.1 * np.diag(np.diag(one)) for one in moments]
    exact = sum(array(delta) @ one for delta, one in zip(deltas, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))
    np.testing.assert_allclose(array(regmean(deltas, [gram(x) for x in xs])), exact, atol=1e-3)


def test_where_no_task_has_inputs_the_mean_stands() -> None:
    deltas, xs = trio(), [inputs(seed) for seed in range(3)]
    for x in xs:
        x[:, 2] = 0
    mean = sum(map(array, deltas)) / 3
    found = array(regmean(deltas, [gram(x) for x in xs]))
    np.testing.assert_allclose(found[:, 2], mean[:, 2], atol=1e-5)
    nothing = [gram(torch.zeros_like(x)) for x in xs]
    np.testing.assert_allclose(array(regmean(deltas, nothing)), mean, atol=1e-5)


def test_where_one_task_alone_has_inputs_it_is_kept() -> None:
    deltas, xs = trio(), [inputs(seed) for seed in range(3)]
    xs[1][:, 2:] = 0
    xs[0][:, :2] = 0
    xs[2][:] = 0
    found = array(regmean(deltas, [gram(x) for x in xs], **LEAST))
    np.testing.assert_allclose(found[:, :2], array(deltas[1])[:, :2], atol=1e-4)
    np.testing.assert_allclose(found[:, 2:], array(deltas[0])[:, 2:], atol=1e-4)


def test_a_site_that_an_adapter_left_alone_is_held_by_its_inputs() -> None:
    delta, none = low_rank(0, 2), LowRank(torch.zeros(9, 0), torch.zeros(0, 7))
    x = inputs(3)
    found = array(regmean([delta, none], [gram(x), gram(3 * x)], **LEAST))
    np.testing.assert_allclose(found, array(delta) / 10, atol=1e-5)
