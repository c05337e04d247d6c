"""Fisher merging: entry by entry against loops."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.statistics import Fisher
from mergekit_bert.composing.method import METHODS, Site, make_options
from mergekit_bert.hardware import generator
from tests.composing.methods.sites import trio

SHAPE = (9, 7)


def information(seed: int, scale: float = 1.0) -> Fisher:
    """Of rank one, so that nothing is lost."""
    source = generator(seed, 6)
    left, right = (torch.rand(size, generator=source, dtype=torch.float64) for size in SHAPE)
    return Fisher.of(scale * torch.outer(left, right), 5)


def fisher(
    deltas: Sequence[Delta], found: Sequence[Fisher], weights: Sequence[float] = (), **options: Any
) -> NDArray[np.float64]:
    record = METHODS.get("fisher")
    site = Site(
        name="layer",
        names=[f"t{place}" for place in range(len(deltas))],
        deltas=deltas,
        weights=list(weights) or [1.0] * len(deltas),
        options=make_options(record, options),
        statistics=[{"fisher": one} for one in found],
    )
    assert record.survey is not None
    survey = record.survey([site])
    return record.merge(Site(**{**vars(site), "survey": survey})).dense().double().numpy()


def array(delta: Delta) -> NDArray[np.float64]:
    return delta.dense().double().numpy()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_entry_is_a_mean_weighted_by_information(weights: tuple[float, ...], normalize: bool) -> None:
    deltas, found = trio(), [information(0), information(1, 50), information(2, 0.1)]
    shares = [one.dense().numpy() / (np.linalg.norm(one.dense()) if normalize else 1) for one in found]
    exact = np.zeros(SHAPE)
    for row in range(9):
        for column in range(7):
            own = [share[row, column] for share in shares]
            values = [w * array(d)[row, column] for w, d in zip(weights, deltas, strict=True)]
            exact[row, column] = np.dot(own, values) / sum(own)
    np.testing.assert_allclose(fisher(deltas, found, weights, normalize=normalize, floor=1e-12), exact, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"floor": 3.0}])
def test_one_task_gives_itself_and_equal_information_the_mean(options: dict[str, Any]) -> None:
    deltas, one = trio(), information(4)
    np.testing.assert_allclose(fisher(deltas[:1], [one], (-3.0,), **options), -3 * array(deltas[0]), rtol=1e-6)
    np.testing.assert_allclose(fisher(deltas, [one] * 3, **options), sum(map(array, deltas)) / 3, atol=1e-6)


def test_the_unit_of_a_tasks_information_does_not_matter_unless_asked() -> None:
    deltas, found = trio(), [information(0), information(1), information(2)]
    scaled = [information(0, 1e4), *found[1:]]
    np.testing.assert_allclose(fisher(deltas, scaled), fisher(deltas, found), atol=1e-5)
    raw, louder = (fisher(deltas, one, normalize=False) for one in (found, scaled))
    assert np.abs(raw - louder).max() > 0.1
    assert np.median(np.abs(louder - array(deltas[0]))) < 0.005


def test_the_norm_is_over_all_sites_together() -> None:
    record = METHODS.get("fisher")
    assert record.survey is not None
    sites = [Site(f"s{n}", ["a"], [], [], statistics=[{"fisher": information(n)}]) for n in range(3)]
    exact = np.sqrt(sum(float(information(n).dense().square().sum()) for n in range(3)))
    assert record.survey(sites)["a"] == pytest.approx(exact)


def test_where_no_task_has_information_the_mean_stands() -> None:
    deltas, mean = trio(), sum(map(array, trio())) / 3
    nothing = Fisher.of(torch.zeros(SHAPE, dtype=torch.float64), 5)
    np.testing.assert_allclose(fisher(deltas, [nothing] * 3), mean, atol=1e-6)
    half = torch.rand(SHAPE, generator=generator(8), dtype=torch.float64)
    half[:, 3:] = 0
    found = fisher(deltas, [Fisher.of(half, 5), nothing, nothing])
    np.testing.assert_allclose(found[:, 3:], mean[:, 3:], atol=1e-6)
    np.testing.assert_allclose(found[:, :3], array(deltas[0])[:, :3], atol=1e-3)
