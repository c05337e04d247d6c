"""The options of an adapter: the scale, and values out of range."""

import math
from typing import Any

import pytest

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.errors import TrainingError, UnknownNameError


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilized", "scale"),
    [(8, 32.0, False, 4.0), (4, 2.0, False, 0.5), (16, 8.0, True, 2.0), (8, 1.0, True, 1 / math.sqrt(8))],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(rank: int, alpha: float, stabilized: bool, scale: float) -> None:
    assert AdapterConfig(rank=rank, alpha=alpha, rank_stabilized=stabilized).scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "option",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"alpha": math.inf},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
    ],
)
def test_a_value_out_of_range_names_its_option(option: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=f"--{next(iter(option))}: .*correct --"):
        AdapterConfig(**option)


def test_an_unknown_basis_is_told() -> None:
    with pytest.raises(UnknownNameError, match=r"'orthogonl'; expected one of orthogonal, random, avoid; did you mean"):
        AdapterConfig(basis="orthogonl")
