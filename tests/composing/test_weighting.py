"""Weights that are learned: a run that was killed goes on from its checkpoint, to the same bits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing import learning, weighting
from mergekit_bert.training.checkpoint import CHECKPOINT
from tests.composing.helpers import given, merged, trio

STEPS = 7


class KilledError(Exception):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert)


def learn(encoder: mb.Encoder, adapters: list[Adapter], method: str, folder: Path | None = None) -> mb.Merged:
    rows = dataclasses.replace(given(encoder, 12), folder=folder)
    return merged(adapters, method, options={"steps": STEPS, "lr": 0.1, "batch_size": 6}, given=rows)


@pytest.mark.parametrize("method", ["adamerging", "nsc"])
@pytest.mark.parametrize("done", [1, 4])
def test_a_killed_run_goes_on_to_the_same_bits(
    bert: mb.Encoder, three: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, done: int
) -> None:
    really, computed, last = weighting._term, 0, -1

    def term(*arguments: Any) -> Callable[[], Tensor]:
        value = really(*arguments)

        def counted() -> Tensor:
            nonlocal computed
            if computed == last:
                raise KilledError
            computed += 1
            return value()

        return counted

    monkeypatch.setattr(weighting, "_term", term)
    monkeypatch.setattr(learning, "_SAVE_SECONDS", -1.0)
    whole = learn(bert, three, method)
    each = computed // STEPS
    assert computed == STEPS * each > 0
    computed, last = 0, done * each + 1
    with pytest.raises(KilledError):
        learn(bert, three, method, tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    computed, last = 0, -1
    again = learn(bert, three, method, tmp_path)
    assert computed == (STEPS - done) * each, "the steps that were done are not done again"
    assert not (tmp_path / CHECKPOINT).exists(), "it is not needed any more"
    assert (again.weights, again.trace) == (whole.weights, whole.trace)
