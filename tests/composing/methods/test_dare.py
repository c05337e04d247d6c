"""DARE: what is dropped, what stays, and that the mean does; against PEFT, and against what a norm does instead."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.delta import Dense, LowRank, add
from mergekit_bert.composing.entrywise import dropped
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.hardware import generator
from tests.adapters.helpers import quick
from tests.composing.helpers import merged, trio
from tests.composing.methods.entries import merge, noise, site

SEEDS = 800


@quick
@given(st.floats(0, 1), st.integers(0, 99))
def test_an_entry_is_dropped_or_scaled_up(drop: float, seed: int) -> None:
    (values,) = noise(1, 4, 5)
    found = merge("dare", [values], seed=seed, drop=drop)
    zero = found == 0
    assert drop > 0 or not zero.any()
    if not zero.all():
        np.testing.assert_allclose(found[~zero], values[~zero].double() / (1 - drop), rtol=1e-6)


def test_dropping_nothing_is_the_sum_and_everything_is_zero() -> None:
    tensors, weights = noise(3, 4, 5), [0.5, -1.0, 2.0]
    exact = sum(weight * one.double() for one, weight in zip(tensors, weights, strict=True))
    np.testing.assert_allclose(merge("dare", tensors, weights, drop=0), exact, atol=1e-6)
    for then in ("linear", "ties"):
        assert torch.equal(merge("dare", tensors, weights, drop=1, then=then), torch.zeros(4, 5))


@pytest.mark.parametrize("drop", [0.2, 0.9])
def test_the_mean_over_seeds_is_the_undropped_merge(drop: float) -> None:
    tensors, weights = noise(2, 3, 4), [0.5, -1.0]
    exact = weights[0] * tensors[0] + weights[1] * tensors[1]
    runs = torch.stack([merge("dare", tensors, weights, seed=seed, drop=drop) for seed in range(SEEDS)])
    # The variance of a kept or dropped entry x is x² p / (1 − p).
    spread = ((weights[0] * tensors[0]) ** 2 + (weights[1] * tensors[1]) ** 2).mul(drop / (1 - drop)).sqrt()
    assert bool(((runs.mean(0) - exact).abs() < 4.5 * spread / SEEDS**0.5).all())
    np.testing.assert_allclose(runs.std(0), spread, rtol=0.25)


def test_as_many_are_dropped_as_asked() -> None:
    shares = [(merge("dare", [torch.ones(100, 100)], seed=seed, drop=0.3) == 0).float().mean() for seed in range(5)]
    np.testing.assert_allclose(shares, 0.3, atol=0.025)


def test_draws_are_an_adapters_own() -> None:
    one, two = noise(2, 6, 6)
    together = merge("dare", [one, two], [1.0, 0.0], drop=0.5)
    assert torch.equal(together, merge("dare", [one], drop=0.5))
    masks = [merge("dare", [torch.ones(6, 6)], name=name, seed=seed, drop=0.5) for name in "ab" for seed in (0, 1)]
    masks.append(merge("dare", [torch.ones(6, 6)] * 2, [0.0, 1.0], name="a", drop=0.5))
    for place, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:place])
    assert torch.equal(masks[0], merge("dare", [torch.ones(6, 6)], name="a", drop=0.5))


def test_a_weight_moves_no_draw() -> None:
    tensors, weights = noise(3, 6, 6), [0.5, 1.0, -0.25]
    for then in ("linear", "ties"):
        first = merge("dare", tensors, weights, drop=0.5, then=then)
        for scale in (2.0, -0.5):
            again = merge("dare", tensors, [scale * weight for weight in weights], drop=0.5, then=then)
            assert torch.equal(again, scale * first)


def kept_here(tensors: list[Tensor], drop: float) -> list[Tensor]:
    """Where each tensor stays, as this seed draws it."""
    here = site("dare", tensors)
    return [
        dropped(torch.ones_like(one), drop, here.generator(name)) != 0
        for one, name in zip(tensors, here.names, strict=True)
    ]


@pytest.mark.parametrize(("then", "theirs"), [("linear", peft.dare_linear), ("ties", peft.dare_ties)])
@pytest.mark.parametrize("drop", [0.25, 0.5])
def test_it_is_pefts_dare_for_the_same_draws(then: str, theirs: object, drop: float) -> None:
    tensors = noise(3, 8, 6)
    masks = [mask.float() for mask in kept_here(tensors, drop)]
    with patch.object(torch, "bernoulli", side_effect=masks):
        expected = theirs(tensors, torch.full((3,), 0.7), 1 - drop)  # type: ignore[operator]
    found = merge("dare", tensors, [0.7] * 3, drop=drop, then=then, density=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ties_trims_what_was_not_dropped() -> None:
    tensors = noise(3, 8, 6)
    scaled = [one * mask / (1 - 0.5) for one, mask in zip(tensors, kept_here(tensors, 0.5), strict=True)]
    expected = merge("ties", scaled, [1.0, 0.5, 2.0], density=0.3)
    found = merge("dare", tensors, [1.0, 0.5, 2.0], drop=0.5, then="ties", density=0.3)
    assert torch.equal(found, expected)
    assert int(found.count_nonzero()) < int(merge("dare", tensors, drop=0.5, then="ties", density=1).count_nonzero())


def test_scaling_to_the_old_norm_would_not_keep_the_mean() -> None:
    # Of the entries 1 and 9 the first stays alone, the second alone, both or none, each a quarter of the time. Scaled
    # back to the sum of magnitudes, the small one becomes 10 whenever it is alone: (10 + 0 + 1 + 0) / 4 = 2.75, not 1.
    draws = [torch.tensor([1.0, 9.0]) * torch.tensor(mask) for mask in ([1, 0], [0, 1], [1, 1], [0, 0])]
    by_norm = torch.stack([one * (10 / one.sum()) if one.any() else one for one in draws]).mean(0)
    assert by_norm.tolist() == [2.75, 4.75]
    ours = [merge("dare", [[[1.0, 9.0]]], seed=seed, drop=0.5).flatten() for seed in range(SEEDS)]
    assert {tuple(one.tolist()) for one in ours} == {(2.0, 0.0), (0.0, 18.0), (2.0, 18.0), (0.0, 0.0)}
    np.testing.assert_allclose(torch.stack(ours).mean(0), [1, 9], rtol=0.15)


@pytest.mark.parametrize("space", SPACES)
def test_the_mean_over_seeds_is_the_sum_in_every_space(space: str) -> None:
    factors = [LowRank(B, A) for B, A in zip(noise(2, 9, 2), noise(2, 2, 8, seed=1), strict=True)]
    exact = add([factors[0], factors[1].scaled(-0.5)]).dense()
    inner, leave = SPACES[space].enter(factors)
    sums = [Dense(merge("dare", inner, [1.0, -0.5], seed=seed, drop=0.3)) for seed in range(300)]
    runs = torch.stack([leave(one).dense() for one in sums])
    off = [float((runs[:count].mean(0) - exact).norm() / exact.norm()) for count in (1, 300)]
    assert off[0] > 0.2
    assert off[1] < 0.1


def test_a_chance_for_each_entry_may_be_one_for_all() -> None:
    (values,) = noise(1, 20, 20)
    found = dropped(values, torch.full((20, 20), 0.5, dtype=torch.float64), generator(3))
    assert torch.equal(found, dropped(values, 0.5, generator(3)))


def test_default_weights_are_those_of_the_sum(bert: mb.Encoder) -> None:
    assert set(merged(trio(bert), "dare").weights.values()) == {0.4}
    assert set(merged(trio(bert)[:1], "dare").weights.values()) == {1.0}
