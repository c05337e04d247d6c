"""One run at a time makes an output, and what others put there in the meantime stays."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import OutputError, TrainingError
from mergekit_bert.training import loop
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.manifest import Control, is_finished, run_folder
from tests.training.runs import everything, log, train, tune, without_seconds

PLAIN, RESUME, FORCE = Control(show=False), Control(show=False, resume=True), Control(show=False, force=True)
BOTH = Control(show=False, resume=True, force=True)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], None]) -> list[int]:
    """Have ``work`` done before the step of that number; the steps that were made."""
    really, done = loop.step, list[int]()

    def step(*arguments: Any) -> float:
        done.append(len(done) + 1)
        if len(done) == number:
            work()
        return really(*arguments)

    monkeypatch.setattr(loop, "step", step)
    return done


def make(kind: str, bert: Encoder, out: Path, control: Control = PLAIN, **options: Any) -> None:
    """An adapter or a whole model."""
    if kind == "full":
        tune(bert, out, control=control, **options)
    else:
        train(bert, out, kind=kind, control=control, **options)


def model_bytes(out: Path) -> bytes:
    return (out / "model.safetensors" if out.is_dir() else out).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("control", [PLAIN, RESUME, FORCE], ids=["plain", "resume", "force"])
def test_a_second_run_is_told_at_once_and_disturbs_nothing(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, control: Control
) -> None:
    out, told = tmp_path / "one/a", list[Exception]()

    def second() -> None:
        try:
            make(kind, bert, out, control)
        except OutputError as error:
            told.append(error)

    def meanwhile() -> None:
        before = everything(tmp_path)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(60)
        assert everything(tmp_path) == before

    at_step(monkeypatch, 7, meanwhile)
    make(kind, bert, out, checkpoint_seconds=0.0)
    assert [str(error) for error in told] == [
        f"{out}: another mbert run is writing it; expected one run at a time; wait for it or choose another path"
    ]
    make(kind, bert, tmp_path / "two/a")
    assert model_bytes(out) == model_bytes(tmp_path / "two/a")
    assert without_seconds(log(out)) == without_seconds(log(tmp_path / "two/a"))
    assert not list((tmp_path / "one").glob(".*"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_that_lost_its_place_is_kept_and_goes_on_without_training(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, whole = tmp_path / "one/a", tmp_path / "two/a"
    make(kind, bert, whole)
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: out.write_text("theirs"))
        with pytest.raises(OutputError, match=r"/a: something else was written there .*; move that away and give `res"):
            make(kind, bert, out)
    assert out.read_text() == "theirs"
    assert not is_finished(out)
    assert (run_folder(out) / CHECKPOINT).exists()
    assert sorted(path.name for path in out.parent.iterdir() if path.name != "basis.json") == ["a", "a.run"]

    steps = at_step(monkeypatch, 0, lambda: None)
    for control in (PLAIN, RESUME):
        with pytest.raises(OutputError, match=r"/a: it exists already"):
            make(kind, bert, out, control)
    assert out.read_text() == "theirs"
    out.unlink()
    make(kind, bert, out, RESUME)
    assert steps == []
    assert model_bytes(out) == model_bytes(whole)
    assert without_seconds(log(out)) == without_seconds(log(whole))
    assert sorted(everything(out.parent)) == sorted(everything(whole.parent))


def test_a_run_that_lost_its_place_may_be_told_to_take_it(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: out.write_text("theirs"))
        with pytest.raises(OutputError, match="something else"):
            train(bert, out)
    steps = at_step(monkeypatch, 0, lambda: None)
    train(bert, out, control=BOTH)
    assert steps == []
    assert is_finished(out)


def test_another_programs_weights_are_refused_before_any_work_whatever_is_asked(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, out, {"format": "pt"})
    before = everything(tmp_path)
    for control in (PLAIN, FORCE, RESUME, BOTH):
        with pytest.raises((OutputError, TrainingError)):
            train(bert, out, control=control)
        assert everything(tmp_path) == before
    with pytest.raises(OutputError, match="with weights that another program wrote"):
        train(bert, out, control=FORCE)


def test_a_model_folder_with_a_note_in_it_is_not_replaced(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "models/sst"
    tune(bert, out)
    tune(bert, out, seed=1, control=FORCE)
    (out / "README.md").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"sst: it exists already and holds README.md"):
        tune(bert, out, control=FORCE)
    assert everything(tmp_path) == before


def test_what_a_user_keeps_in_the_run_folder_stays(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    run_folder(out).mkdir()
    (run_folder(out) / "notes.txt").write_text("mine")
    train(bert, out)
    train(bert, out, seed=1, control=FORCE)
    assert (run_folder(out) / "notes.txt").read_text() == "mine"


def test_a_run_that_cannot_begin_leaves_the_old_record(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out)
    before = everything(tmp_path)
    with pytest.raises(TrainingError, match="torch uses"):
        train(bert, out, control=FORCE, threads=63)
    assert everything(tmp_path) == before


def test_two_outputs_of_one_run_folder_do_not_replace_each_others_record(bert: Encoder, tmp_path: Path) -> None:
    train(bert, tmp_path / "a.safetensors")
    before = everything(tmp_path)
    for control in (PLAIN, FORCE, RESUME):
        with pytest.raises(TrainingError, match=r"a.run: it belongs to a.safetensors; .*choose another `out`"):
            tune(bert, tmp_path / "a", control=control)
    assert everything(tmp_path) == before
    (tmp_path / "a.safetensors").unlink()
    tune(bert, tmp_path / "a")
    assert is_finished(tmp_path / "a")
