"""The options of the loop: what is out of range is refused by its name on the command line."""

import dataclasses
import math
from typing import Any

import pytest

from mergekit_bert.errors import TrainingError
from mergekit_bert.training.config import TrainConfig

WRONG: list[tuple[str, Any]] = [
    ("epochs", 0),
    ("batch_size", 0),
    ("batch_size", -3),
    ("patience", 0),
    ("lr", 0.0),
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("head_lr", 0.0),
    ("head_lr", math.nan),
    ("clip", 0.0),
    ("clip", math.nan),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("warmup", -0.1),
    ("warmup", 1.0),
    ("warmup", math.nan),
    ("head_dropout", 1.0),
    ("head_dropout", -0.5),
    ("hold_out", 0.0),
    ("hold_out", 1.0),
    ("hold_out", math.nan),
    ("max_length", 7),
    ("seed", -1),
    ("threads", 0),
    ("epochs", 10**400),
    ("batch_size", 10**400),
    ("patience", 10**400),
    ("hold_out_limit", 10**400),
    ("max_length", 2**20 + 1),
    ("seed", 2**63),
    ("threads", 10**400),
    ("lr", 1e300),
    ("clip", math.inf),
    ("weight_decay", math.inf),
    ("checkpoint_seconds", math.inf),
    ("checkpoint_seconds", math.nan),
    ("checkpoint_seconds", -1.0),
]


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_an_option_out_of_range_is_told_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=f"^`{option}`: .*; expected .*; correct it$"):
        TrainConfig(**{option: value})


def test_a_huge_number_is_not_printed_whole() -> None:
    with pytest.raises(TrainingError) as caught:
        TrainConfig(epochs=10**4000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("option", "value"),
    [("warmup", 0.0), ("head_dropout", 0.0), ("weight_decay", 0.0), ("epochs", 1), ("max_length", 8), ("lr", 1e-9)],
)
def test_the_edges_are_allowed(option: str, value: Any) -> None:
    assert getattr(TrainConfig(**{option: value}), option) == value


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 5  # type: ignore[misc]
