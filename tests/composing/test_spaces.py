"""Spaces: going in and back loses nothing, and what a space promises of its coordinates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert.adapters.delta import Delta, Dense, LowRank, add
from mergekit_bert.composing.spaces import SPACES
from tests.adapters.helpers import quick

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
RANKS = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def draw(shape: tuple[int, int], ranks: list[int], seed: int, dense: bool = False) -> list[Delta]:
    source = torch.Generator().manual_seed(seed)
    found: list[Delta] = []
    for place, rank in enumerate(ranks):
        one = LowRank(torch.randn(shape[0], rank, generator=source), torch.randn(rank, shape[1], generator=source))
        found.append(Dense(one.dense()) if dense and place == 0 else one)
    return found


@pytest.mark.parametrize("space", SPACES)
@settings(quick, max_examples=60)
@given(shape=SHAPES, ranks=RANKS, seed=st.integers(0, 999), dense=st.booleans())
def test_every_delta_comes_back(space: str, shape: tuple[int, int], ranks: list[int], seed: int, dense: bool) -> None:
    deltas = draw(shape, ranks, seed, dense)
    inner, leave = SPACES[space].enter(deltas)
    for one, two in zip(deltas, inner, strict=True):
        back = leave(two)
        assert back.shape == shape
        np.testing.assert_allclose(back.dense(), one.dense(), atol=2e-5)
        as_matrix = leave(Dense(two.dense()))
        np.testing.assert_allclose(as_matrix.dense(), one.dense(), atol=2e-5)


@pytest.mark.parametrize("space", SPACES)
@settings(quick, max_examples=40)
@given(shape=SHAPES, ranks=RANKS, seed=st.integers(0, 999))
def test_a_linear_merge_inside_is_one_outside(space: str, shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    deltas = draw(shape, ranks, seed)
    weights = torch.randn(len(deltas), generator=torch.Generator().manual_seed(seed)).tolist()
    inner, leave = SPACES[space].enter(deltas)
    inside = leave(add([one.scaled(weight) for one, weight in zip(inner, weights, strict=True)]))
    outside = sum(weight * one.dense() for weight, one in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(inside.dense(), outside, atol=5e-5)


def test_core_is_no_larger_than_the_ranks_together_and_keeps_angles() -> None:
    deltas = draw((40, 30), [3, 2, 4], 1)
    inner, _ = SPACES["core"].enter(deltas)
    assert {one.shape for one in inner} == {(9, 9)}
    for one, two in zip(deltas, inner, strict=True):
        np.testing.assert_allclose(
            torch.linalg.svdvals(one.dense().double())[:9], torch.linalg.svdvals(two.dense()), atol=1e-4
        )
    product = (deltas[0].dense().double() * deltas[1].dense()).sum()
    np.testing.assert_allclose((inner[0].dense() * inner[1].dense()).sum(), product, rtol=1e-4)


def test_core_depends_on_the_delta_and_not_on_how_it_is_split() -> None:
    one, two = draw((8, 7), [2, 3], 4)
    assert isinstance(one, LowRank)
    mix = torch.tensor([[2.0, 1.0], [-3.0, 0.5]])
    other = LowRank(one.B @ mix, torch.linalg.inv(mix) @ one.A)
    first, second = (SPACES["core"].enter([split, two])[0] for split in (one, other))
    for left, right in zip(first, second, strict=True):
        np.testing.assert_allclose(left.dense().abs(), right.dense().abs(), atol=1e-4)


def test_knots_are_rows_of_the_concatenation_s_decomposition() -> None:
    """Against the definition: SVD of the dense ``[Δ1 | Δ2]``, and a Delta's coordinates are ``Σ Viᵀ``."""
    deltas = draw((8, 6), [2, 3], 7)
    u, values, vh = torch.linalg.svd(torch.cat([one.dense() for one in deltas], 1).double(), full_matrices=False)
    exact = [values[:5, None] * vh[:5, 6 * n : 6 * n + 6] for n in range(2)]
    inner, _ = SPACES["knots"].enter(deltas)
    signs = torch.sign((u[:, :5].T @ deltas[0].dense().double() * inner[0].dense()).sum(1))
    for one, two in zip(inner, exact, strict=True):
        np.testing.assert_allclose(one.dense(), signs[:, None] * two, atol=1e-5)
