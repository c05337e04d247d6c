"""Breadcrumbs: the band that is kept, counted exactly, and small tensors that survive it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from peft.utils.merge_utils import magnitude_prune

import mergekit_bert as mb
from mergekit_bert.composing.methods.breadcrumbs import band
from tests.adapters.helpers import quick, random_adapter
from tests.composing.helpers import merged, trio
from tests.composing.methods.entries import SMALL, merge, noise, ranked

PERCENT = st.integers(0, 100)


@quick
@given(hn.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 6)), elements=SMALL), PERCENT, PERCENT)
def test_the_band_comes_right_after_the_largest(values: np.ndarray, density: int, gamma: int) -> None:
    found = band(torch.tensor(values), density / 100, gamma / 100)
    cut = math.floor(Fraction(gamma, 100) * values.size)
    kept = math.ceil(Fraction(density, 100) * values.size)
    order = ranked(values.flatten().tolist())
    assert set(found.flatten().nonzero().flatten().tolist()) == set(order[cut : cut + kept])


def test_the_sum_by_hand() -> None:
    one, two = [[9.0, -1.0, 3.0, 0.5]], [[1.0, 2.0, -8.0, 4.0]]
    # γ takes 9 and −8; a density of one half keeps 3 and −1, and 4 and 2.
    found = merge("breadcrumbs", [one, two], [1.0, -2.0], density=0.5, gamma=0.25)
    assert found.tolist() == [[0, -1 - 4, 3, -8]]


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_without_outliers_it_is_pefts_pruned_sum(density: float) -> None:
    tensors, weights = noise(3, 8, 6), [1.0, -0.5, 2.0]
    expected = magnitude_prune(tensors, torch.tensor(weights), density)
    np.testing.assert_allclose(merge("breadcrumbs", tensors, weights, density=density, gamma=0), expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.006, 0.01, 0.49])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5])
def test_one_and_two_entries_survive(density: float, gamma: float) -> None:
    assert merge("breadcrumbs", [[[-7.0]]], density=density, gamma=gamma).tolist() == [[-7]]
    assert merge("breadcrumbs", [[[1.0, -2.0]]], density=density, gamma=gamma).tolist() == [[0, -2]]
    assert merge("breadcrumbs", [[[1.0], [-2.0]]], density=1, gamma=gamma).tolist() == [[1], [-2]]


def test_half_of_two_entries_as_outliers_leaves_the_other() -> None:
    assert merge("breadcrumbs", [[[1.0, -2.0]]], density=0.15, gamma=0.5).tolist() == [[1, 0]]


def test_outliers_go_whatever_the_density() -> None:
    # A density of 1, or one that leaves no room for γ, brings no outlier back.
    values = [[float(n) for n in range(1, 11)]]
    for density in (0.95, 1.0):
        found = merge("breadcrumbs", [values], density=density, gamma=0.1)
        assert found.tolist() == [[*values[0][:9], 0]]
    assert not merge("breadcrumbs", [values], density=1, gamma=1).any()
    assert not merge("breadcrumbs", [values], density=0, gamma=0.1).any()


def test_shares_are_of_the_tensor_not_of_each_row() -> None:
    loud, quiet = [float(n) for n in range(11, 21)], [float(n) for n in range(1, 11)]
    found = merge("breadcrumbs", [[loud, quiet]], density=0.5, gamma=0.1)
    assert found.tolist() == [[*loud[:8], 0, 0], [0] * 8 + quiet[8:]]


@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_all_kept_is_the_sum_in_every_space(bert: mb.Encoder, space: str) -> None:
    adapters = trio(bert, targets="qv")
    weights = {"sst": 1.0, "sts": -0.5, "para": 2.0}
    exact = merged(adapters, "task_arithmetic", weights)
    model = merged(adapters, "breadcrumbs", weights, space=space, options={"density": 1, "gamma": 0})
    for name, delta in exact.deltas.items():
        np.testing.assert_allclose(model.deltas[name].dense(), delta.dense(), atol=2e-5)


def test_kept_entries_are_counted_exactly(bert: mb.Encoder) -> None:
    model = merged([random_adapter(bert, "sst")], "breadcrumbs")
    for delta in model.deltas.values():
        assert int(delta.dense().count_nonzero()) == math.ceil(Fraction(15, 100) * delta.shape[0] * delta.shape[1])
