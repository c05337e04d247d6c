"""Runs that were cut short go on to the same bytes; what cannot be resumed is told in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.config import AdapterConfig, PrefixOptions
from mergekit_bert.encoder.forward import check_same_outputs
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import ModelFileError, TrainingError
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training import loop, run
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.manifest import Control, is_finished, run_folder
from tests.training.runs import everything, log, manifest, train, tune, without_seconds

RESUME, FORCE, PLAIN = Control(show=False, resume=True), Control(show=False, force=True), Control(show=False)


class Killed(BaseException):
    """Stands for a kill inside this process."""


def cut_short(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have the next run stop after ``steps`` steps, with a checkpoint of the step before."""
    really, count = loop.step, 0

    def step(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > steps:
            raise Killed
        return really(*arguments)

    monkeypatch.setattr(loop, "step", step)


def unfinished(bert: Encoder, out: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 7, **options: Any) -> None:
    with monkeypatch.context() as patch:
        cut_short(patch, steps)
        with pytest.raises(Killed):
            train(bert, out, **({"checkpoint_seconds": 0.0} | options))
    assert not is_finished(out)
    assert (run_folder(out) / CHECKPOINT).exists()


@pytest.mark.parametrize("steps", [1, 6, 7, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"task": "sts"},
        {"kind": "probe"},
        {"kind": "dora"},
        {"kind": "prefix", "adapter": PrefixOptions(length=3, projection=True)},
        {"kind": "prefix", "precision": "bf16"},
        {"kind": "lora+prompt"},
        {"precision": "bf16"},
        {"adapter": AdapterConfig(rank=2, dropout=0.2, basis="random", train_bias=True, train_layernorm=True)},
    ],
    ids=[
        "regression",
        "probe",
        "dora",
        "prefix by its MLP",
        "prefix in bf16",
        "lora and prompt",
        "bf16",
        "dropout and shifts",
    ],
)
def test_every_kind_of_run_goes_on_to_the_same_bytes(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steps: int
) -> None:
    out, whole = tmp_path / "one/a.safetensors", tmp_path / "two/a.safetensors"
    unfinished(bert, out, monkeypatch, steps, **options)
    train(bert, out, control=RESUME, **options)
    train(bert, whole, **options)
    assert out.read_bytes() == whole.read_bytes()
    assert without_seconds(log(out)) == without_seconds(log(whole))


def test_steps_after_the_last_checkpoint_are_logged_once(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "one/a", tmp_path / "two/a"
    really = loop.save_checkpoint

    def once(path: Path, objective: Any, progress: Any, *rest: Any) -> None:
        if progress.step == 6:
            really(path, objective, progress, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", once)
        unfinished(bert, out, monkeypatch, 11)
    assert [event["step"] for event in log(out)] == [6, 10], "step 10 was logged, the checkpoint is of step 6"
    train(bert, out, control=RESUME)
    train(bert, whole)
    assert without_seconds(log(out)) == without_seconds(log(whole))
    assert out.read_bytes() == whole.read_bytes()


def test_an_early_stop_is_kept_through_a_resume(bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"epochs": 20, "patience": 1, "kind": "probe", "lr": 0.3}
    out, whole = tmp_path / "one/a", tmp_path / "two/a"
    train(bert, whole, **options)
    epochs = len(manifest(whole)["history"])
    assert epochs < 20
    unfinished(bert, out, monkeypatch, 6 * (epochs - 1) + 3, **options)
    train(bert, out, control=RESUME, **options)
    assert manifest(out)["history"] == manifest(whole)["history"]
    assert out.read_bytes() == whole.read_bytes()


def test_a_checkpoint_is_written_as_often_as_asked(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, steps = loop.save_checkpoint, list[int]()

    def note(path: Path, objective: Any, progress: Any, *rest: Any) -> None:
        steps.append(progress.step)
        really(path, objective, progress, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", note)
    train(bert, tmp_path / "a", checkpoint_seconds=1e9)
    assert steps == []
    steps.clear()
    train(bert, tmp_path / "b", checkpoint_seconds=0.0)
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("kind", ["lora", "probe", "full"])
def test_a_finished_run_comes_back_and_no_byte_changes(bert: Encoder, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a"

    def make(control: Control) -> Any:
        return tune(bert, out, control=control) if kind == "full" else train(bert, out, kind=kind, control=control)

    first = make(PLAIN)
    before = everything(tmp_path)
    second = make(RESUME)
    assert everything(tmp_path) == before
    if kind == "full":
        assert second.record == first.record
    else:
        assert second.training == first.training
        assert all(second.head[name].equal(tensor) for name, tensor in first.head.items())


@pytest.mark.parametrize("done", [True, False], ids=["finished", "unfinished"])
def test_automatic_precision_is_found_out_once(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    out = tmp_path / "a"
    monkeypatch.setattr(run, "pick_precision", lambda asked, device: torch.bfloat16)
    if done:
        train(bert, out, precision="auto")
    else:
        unfinished(bert, out, monkeypatch, precision="auto")
    monkeypatch.setattr(run, "pick_precision", lambda asked, device: torch.float32)
    assert train(bert, out, precision="auto", control=RESUME).training["precision"] == "bfloat16"


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 3}, r"train.epochs was 2, now 3"),
    "seed": ({"seed": 1}, r"train.seed was 0, now 1"),
    "batch size": ({"batch_size": 4}, r"train.batch_size was 8, now 4"),
    "rate": ({"lr": 0.5}, r"lr was 0.01, now 0.5"),
    "task": ({"task": "sts"}, r"task.name was 'sst', now 'sts'"),
    "rows": ({"rows": 61}, r"data was "),
    "precision": ({"precision": "bf16"}, r"precision was 'float32', now 'bfloat16'"),
    "rank": ({"adapter": AdapterConfig(rank=3)}, r"adapter.rank was 2, now 3"),
    "basis": ({"adapter": AdapterConfig(rank=2, basis="random")}, r"adapter.basis was 'orthogonal', now 'random'"),
    "type": ({"kind": "probe"}, r"type was 'lora', now 'probe'"),
}


@pytest.mark.parametrize("done", [True, False], ids=["finished", "unfinished"])
def test_other_options_are_refused_by_name_and_change_nothing(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    out = tmp_path / "a.safetensors"
    if done:
        train(bert, out)
    else:
        unfinished(bert, out, monkeypatch)
    before = everything(tmp_path)
    for options, message in OTHER.values():
        with pytest.raises(TrainingError, match=message) as caught:
            train(bert, out, control=RESUME, **options)
        assert "\n" not in str(caught.value)
        assert everything(tmp_path) == before
    train(bert, out, control=RESUME)
    assert is_finished(out)


def test_another_base_is_refused(
    bert: Encoder, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(bert, tmp_path / "a", monkeypatch)
    with pytest.raises(TrainingError, match="base was "):
        train(encoders["electra"], tmp_path / "a", control=RESUME)


def test_an_unfinished_run_needs_a_decision(bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.safetensors"
    unfinished(bert, out, monkeypatch)
    before = everything(tmp_path)
    with pytest.raises(TrainingError, match=r"a.run: an unfinished run; .*; give `resume` to continue it or `force`"):
        train(bert, out)
    assert everything(tmp_path) == before
    train(bert, out, seed=5, control=FORCE)
    other = tmp_path / "other/a.safetensors"
    train(bert, other, seed=5)
    assert out.read_bytes() == other.read_bytes()


def test_a_forced_run_that_was_cut_short_does_not_come_back_as_the_old_one(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "a.safetensors", tmp_path / "other/a.safetensors"
    train(bert, out, seed=1)
    old = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", lambda *given: pytest.fail("cut short"))
        with pytest.raises(pytest.fail.Exception):
            train(bert, out, control=FORCE)
    assert not is_finished(out)
    train(bert, out, control=RESUME)
    train(bert, other)
    assert out.read_bytes() == other.read_bytes() != old


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_output_that_fails_its_check_does_not_stay(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "a"
    make = tune if kind == "full" else train
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "check_same_outputs", lambda *given: check_same_outputs("a", np.zeros((1, 1)), np.ones((1, 1)))
        )
        with pytest.raises(ModelFileError, match="after saving its outputs differ"):
            make(bert, out)
    assert not out.exists()
    make(bert, out, control=RESUME)
    assert is_finished(out)


def test_resume_with_nothing_there_starts(bert: Encoder, tmp_path: Path) -> None:
    train(bert, tmp_path / "one/a", control=RESUME)
    train(bert, tmp_path / "two/a")
    assert (tmp_path / "one/a").read_bytes() == (tmp_path / "two/a").read_bytes()


def test_an_output_of_unknown_making_cannot_be_resumed(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out)
    before = out.read_bytes()
    (run_folder(out) / "manifest.json").unlink()
    with pytest.raises(TrainingError, match="the output exists, but no manifest records how it was trained"):
        train(bert, out, control=RESUME)
    assert out.read_bytes() == before


def break_tensor(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    tensors.pop("generator.dropout")
    write_tensors(path, tensors, metadata)


def break_optimizer(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    tensors["optimizer.0.step"] += 1
    write_tensors(path, tensors, metadata)


def break_epochs(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    metadata["progress"]["epochs"].append({"train_loss": 1.0, "score": 1.0})
    write_tensors(path, tensors, metadata)


def break_version(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"format": 99})


def break_progress(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"progress": {"nothing": 1}})


BROKEN = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no header": lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]),
    "another file": lambda path: path.write_bytes((path.parents[1] / "other").read_bytes()),
    "another version": break_version,
    "a tensor less": break_tensor,
    "a step of the optimizer more": break_optimizer,
    "an epoch more": break_epochs,
    "other metadata": break_progress,
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_one_line(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, tmp_path / "other", epochs=1)
    unfinished(bert, out, monkeypatch)
    BROKEN[fault](run_folder(out) / CHECKPOINT)
    with pytest.raises((TrainingError, ModelFileError), match=r"a.run/checkpoint.safetensors: ") as caught:
        train(bert, out, control=RESUME)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    train(bert, out, control=FORCE)
    assert is_finished(out)
