"""The descent of a merge: killed, it goes on from its checkpoint; another run's or a broken one is never believed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_bert.composing import learning
from mergekit_bert.composing.learning import MergeObjective, descend
from mergekit_bert.errors import CompositionError, OutputError
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.objective import Term

STEPS = 6


class KilledError(Exception):
    """Stands for a signal."""


class Square(MergeObjective):
    """The squares of some weights, in two terms; a second parameter gets no gradient before step 3."""

    def __init__(self, last: int) -> None:
        weights = {"weight": nn.Parameter(torch.ones(3)), "late": nn.Parameter(torch.ones(2, 2))}
        super().__init__("squares", weights, STEPS, 0.1, "one run")
        self.last, self.done = last, list[int]()

    def terms(self, step: int) -> Iterator[Term]:
        if step == self.last:
            raise KilledError
        self.done.append(step)
        yield lambda: self.parameters["weight"][:2].square().sum()
        yield lambda: self.parameters["weight"][2:].square().sum()
        if step >= 3:
            yield lambda: self.parameters["late"].square().sum()


def run(folder: Path | None, last: int = STEPS) -> tuple[Square, list[float]]:
    """A descent, killed before the step ``last``: the objective as it was left, and the losses of all steps."""
    objective = Square(last)
    try:
        return objective, descend(objective, folder)
    except KilledError:
        assert folder is not None
        assert (folder / CHECKPOINT).exists()
        return objective, []


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(learning, "_SAVE_SECONDS", -1.0)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("last", range(1, STEPS))
def test_a_killed_descent_goes_on_to_the_same_bits(tmp_path: Path, last: int) -> None:
    whole, losses = run(None)
    run(tmp_path, last)
    again, found = run(tmp_path)
    assert again.done == list(range(last, STEPS))
    assert found == losses
    assert all(torch.equal(value, again.parameters[name]) for name, value in whole.parameters.items())
    assert not tmp_path.exists(), "nothing is left"


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_of_another_source_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    assert run(tmp_path, last=4)[0].done == [0, 1, 2, 3]
    if changed:
        monkeypatch.setattr(learning, "made_by", lambda: {"source": "of another version"})
    assert run(tmp_path)[0].done == list(range(0 if changed else 4, STEPS))


def test_a_descent_is_adam_on_a_broken_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam by its formula, the gradient cut to norm 1, on the parameter that every step moves."""
    monkeypatch.setattr(Square, "terms", lambda self, step: [lambda: self.parameters["weight"].square().sum()])
    found, losses = run(None)
    value, first, second, expected = torch.ones(3), torch.zeros(3), torch.zeros(3), list[float]()
    for step, rate in enumerate((1.0, 1.0, 0.8, 0.6, 0.4, 0.2), start=1):
        expected.append(float(value.square().sum()))
        gradient = 2 * value / max(1.0, float((2 * value).norm()))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        value = value - 0.1 * rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found.parameters["weight"].detach(), value)


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
BROKEN: dict[str, Change] = {
    "a format of before": lambda tensors, told: told.update(format=1),
    "another kind of file": lambda tensors, told: told.update(kind="adapter"),
    "no run": lambda tensors, told: told.pop("run"),
    "a step too many": lambda tensors, told: told["progress"].update(step=STEPS + 1),
    "no step": lambda tensors, told: told["progress"].update(step=0, losses=[]),
    "a loss less": lambda tensors, told: told["progress"]["losses"].pop(),
    "a loss that is a text": lambda tensors, told: told["progress"].update(losses=["1"] * 4),
    "an epoch": lambda tensors, told: told["progress"].update(epochs=[{"train_loss": 1.0, "score": 1.0}]),
    "an unknown figure": lambda tensors, told: told["progress"].update(best_epoch=0),
    "no value": lambda tensors, told: tensors.pop("value.weight"),
    "no moment": lambda tensors, told: tensors.pop("optimizer.0.exp_avg"),
    "a moment alone": lambda tensors, told: tensors.pop("optimizer.1.step"),
    "a moment of another shape": lambda tensors, told: tensors.update({"optimizer.0.exp_avg": torch.zeros(1)}),
    "a moment of another type": lambda tensors, told: tensors.update(
        {"optimizer.0.exp_avg": torch.zeros(3, dtype=torch.float64)}
    ),
    "a step of the future": lambda tensors, told: tensors.update({"optimizer.0.step": torch.tensor(5.0)}),
    "half a step": lambda tensors, told: tensors.update({"optimizer.0.step": torch.tensor(0.5)}),
    "steps of another shape": lambda tensors, told: tensors.update({"optimizer.0.step": torch.ones(2)}),
    "no state": lambda tensors, told: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")],
    "a parameter more": lambda tensors, told: tensors.update({"optimizer.2.step": torch.tensor(1.0)}),
    "a generator": lambda tensors, told: tensors.update({"generator.dropout": torch.zeros(8, dtype=torch.uint8)}),
    "a best value": lambda tensors, told: tensors.update({"best.weight": torch.zeros(3)}),
}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("fault", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    run(tmp_path, last=4)
    tensors, told = read_tensors(tmp_path / CHECKPOINT)
    BROKEN[fault](tensors, told)
    write_tensors(tmp_path / CHECKPOINT, tensors, told)
    with pytest.raises(
        CompositionError, match=r"checkpoint.safetensors: .*; remove it to start the merge again"
    ) as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("often")
def test_a_training_runs_checkpoint_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path, last=4)
    tensors, told = read_tensors(tmp_path / CHECKPOINT)
    write_tensors(tmp_path / CHECKPOINT, tensors, told | {"run": {"task": {"name": "sst"}}})
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(OutputError, match="the checkpoint of an unfinished training run"):
        run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
