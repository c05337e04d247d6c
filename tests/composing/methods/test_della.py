"""DELLA: chances by rank, rows that keep their mean, and the merge of what is left."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from mergekit_bert.composing.methods.della import chances
from tests.adapters.helpers import quick
from tests.composing.methods.entries import NAMES, SMALL, merge, noise, site

SEEDS = 1000
SHARES = st.integers(0, 100).map(lambda percent: percent / 100)


@quick
@given(hn.arrays(np.float32, (3, 5), elements=SMALL), SHARES, SHARES)
def test_chances_fall_in_equal_steps_with_the_rank(values: np.ndarray, drop: float, window: float) -> None:
    found = chances(torch.tensor(values), drop, window).numpy()
    reach = min(window / 2, drop, 1 - drop)
    for row, here in zip(values.tolist(), found, strict=True):
        # From the smallest to the largest; of equal ones the first is the smaller.
        for rank, place in enumerate(sorted(range(5), key=lambda at: (abs(row[at]), at))):
            assert here[place] == pytest.approx(drop + reach - rank * 2 * reach / 4, abs=1e-12)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found.mean(1), drop, atol=1e-12)


def test_chances_by_hand() -> None:
    found = chances(torch.tensor([[0.1, -3.0, 2.0], [5.0, 0.0, -1.0]]), 0.5, 0.2)
    np.testing.assert_allclose(found, [[0.6, 0.4, 0.5], [0.4, 0.6, 0.5]])


@pytest.mark.parametrize(("drop", "shape"), [(0.3, (4, 1)), (0.5, (1, 1)), (0.0, (2, 2)), (1.0, (2, 3))])
def test_chances_without_an_order_or_a_choice(drop: float, shape: tuple[int, int]) -> None:
    # Ranks scaled by (last − first) would be 0 / 0 in a row of one entry.
    np.testing.assert_allclose(chances(noise(1, *shape)[0], drop, 0.14), torch.full(shape, drop))


def test_what_stays_is_divided_by_its_own_chance() -> None:
    (values,) = noise(1, 6, 7)
    stays = 1 - chances(values, 0.5, 0.6)
    found = torch.stack([merge("della", [values], seed=seed, drop=0.5, window=0.6) for seed in range(SEEDS)])
    for one in found[:20]:
        np.testing.assert_allclose(one[one != 0], (values / stays)[one != 0], rtol=1e-5)
    often = (found != 0).double().mean(0)
    np.testing.assert_allclose(often, stays, atol=4.5 * 0.5 / SEEDS**0.5)
    spread = values.abs() * ((1 - stays) / stays).sqrt()
    assert bool(((found.mean(0) - values).abs() < 4.5 * spread / SEEDS**0.5).all())


def test_one_scale_for_all_would_not_keep_the_mean() -> None:
    # Drop .5, window .4: entry 1 stays with .3, entry 9 with .7. One common factor for all cannot serve both: the one
    # that keeps the expected total, 10 / 6.6, gives entry 1 a mean of .45 and entry 9 one of 9.5.
    stays = 1 - chances(torch.tensor([[1.0, 9.0]]), 0.5, 0.4)
    np.testing.assert_allclose(stays, [[0.3, 0.7]])
    common = torch.tensor([1.0, 9.0]) * stays * 10 / (0.3 * 1 + 0.7 * 9)
    np.testing.assert_allclose(common, [[0.4545, 9.5455]], atol=1e-4)
    runs = [merge("della", [[[1.0, 9.0]]], seed=seed, drop=0.5, window=0.4) for seed in range(SEEDS)]
    np.testing.assert_allclose(torch.stack(runs).mean(0), [[1, 9]], rtol=0.2)


def test_what_is_left_is_merged_as_ties_merges_it() -> None:
    tensors, weights = noise(3, 6, 8), [1.0, -0.5, 2.0]
    here = site("della", tensors)
    left = []
    for name, values in zip(NAMES, tensors, strict=False):
        chance = chances(values, 0.4, 0.3)
        stays = torch.rand(6, 8, generator=here.generator(name), dtype=torch.float64) >= chance
        left.append((values * stays / (1 - chance)).float())
    expected = merge("ties", left, weights, density=1)
    np.testing.assert_allclose(merge("della", tensors, weights, drop=0.4, window=0.3), expected, rtol=1e-5)


def test_without_a_window_it_is_dare_with_ties() -> None:
    tensors, weights = noise(3, 6, 8), [1.0, -0.5, 2.0]
    found = merge("della", tensors, weights, drop=0.4, window=0)
    np.testing.assert_allclose(found, merge("dare", tensors, weights, drop=0.4, then="ties", density=1), rtol=1e-6)


def test_dropping_nothing_is_ties_untrimmed_and_everything_is_zero() -> None:
    tensors, weights = noise(3, 4, 5), [0.5, -1.0, 2.0]
    assert torch.equal(merge("della", tensors, weights, drop=0), merge("ties", tensors, weights, density=1))
    assert torch.equal(merge("della", tensors, weights, drop=1), torch.zeros(4, 5))


def test_a_weight_moves_no_draw() -> None:
    tensors, weights = noise(3, 6, 6), [0.5, 1.0, -0.25]
    first = merge("della", tensors, weights)
    for scale in (2.0, -0.5):
        assert torch.equal(merge("della", tensors, [scale * weight for weight in weights]), scale * first)
