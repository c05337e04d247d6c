"""Correlations of the doctor's numbers with losses: against scipy's, and within tasks by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.predicting import POOLED, WITHIN, correlations, table_of

TASKS = ("sst", "sts", "para")


def points(seed: int) -> list[dict[str, Any]]:
    source = np.random.default_rng(seed)
    return [
        {
            "set": f"orthogonal_{place // 3}",
            "task": TASKS[place % 3],
            "numbers": {"answers": float(source.normal()), "basis": 0.0},
            "losses": {"ties": float(source.normal()), "pico": float(source.normal())},
        }
        for place in range(12)
    ]


@pytest.mark.parametrize(("ranks", "peer"), [(True, stats.spearmanr), (False, stats.pearsonr)])
def test_they_are_those_of_scipy(ranks: bool, peer: Callable[..., Any]) -> None:
    given = points(0)
    told = correlations(given, ranks)
    number = np.array([one["numbers"]["answers"] for one in given])
    losses = {name: np.array([one["losses"][name] for one in given]) for name in ("ties", "pico")}
    both = (losses["ties"] + losses["pico"]) / 2
    tasks = np.array([one["task"] for one in given])
    within = [values - [values[tasks == task].mean() for task in tasks] for values in (number.round(6), both)]
    expected = {
        "ties": peer(number, losses["ties"])[0],
        "pico": peer(number, losses["pico"])[0],
        POOLED: peer(number, both)[0],
        WITHIN: peer(*within)[0],
    }
    for column, value in expected.items():
        found = told["answers"][column]
        assert found is not None
        assert found[0] == pytest.approx(value, abs=1e-4), column
        assert found[1] <= found[2]


def test_a_number_that_never_changes_has_none() -> None:
    told = correlations(points(1), True)
    assert set(told["basis"].values()) == {None}
    assert "| basis | – | – | – | – |" in table_of(told)
