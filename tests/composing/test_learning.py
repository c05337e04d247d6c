"""The descent: a run that was killed goes on from its checkpoint, unless the source has changed since."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergekit_bert.composing import learning
from mergekit_bert.composing.learning import CHECKPOINT, descend

STEPS = 6


class KilledError(Exception):
    """Stands for a signal."""


def steps_done(folder: Path, last: int = STEPS) -> list[int]:
    """The steps of a descent that were computed, killed before ``last``."""
    weight, done = nn.Parameter(torch.ones(3)), list[int]()

    def loss(step: int) -> list[Callable[[], Tensor]]:
        if step == last:
            raise KilledError
        done.append(step)
        return [lambda: weight.square().sum()]

    try:
        descend({"weight": weight}, loss, STEPS, 0.1, "one run", folder)
    except KilledError:
        assert (folder / CHECKPOINT).exists()
    return done


@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_of_another_source_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    monkeypatch.setattr(learning, "_SAVE_SECONDS", -1.0)
    assert steps_done(tmp_path, last=4) == [0, 1, 2, 3]
    if changed:
        monkeypatch.setattr(learning, "made_by", lambda: {"source": "of another version"})
    assert steps_done(tmp_path) == list(range(0 if changed else 4, STEPS))
