"""``mbert compare`` from the command line."""

import json
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.evaluation import method_comparison
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert
from tests.corpus import write_corpus

FEW = ("--methods", "fedavg,ties", "--spaces", "full", "--data", "data")


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_comparison, "RESAMPLES", 20)


@pytest.fixture
def home(bert: mb.Encoder, tmp_path: Path) -> Path:
    """Two adapters and a probe in ``adapters/``, rows in ``data/``."""
    for place, task in enumerate(("sst", "sts")):
        one = random_adapter(bert, task, start=3 * place, seed=place, targets="qv")
        write_adapter(tmp_path / f"adapters/{task}.safetensors", one)
    write_adapter(tmp_path / "adapters/sst.probe.safetensors", random_adapter(bert, "sst", kind="probe"))
    write_corpus(tmp_path / "data", ("sst", "sts"), train=40)
    return tmp_path


def test_probes_in_the_folder_are_no_inputs_and_two_of_one_task_are_a_choice(bert: mb.Encoder, home: Path) -> None:
    done = mbert("compare", *FEW, here=home)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[2:5]].count("ensemble") == 1
    assert "scored on dev rows: 30 of sst, 30 of sts" in done.out
    assert "record them with: mbert finetune --task sst --data data" in done.out
    assert "memory rise" in done.out
    write_adapter(home / "adapters/more.safetensors", random_adapter(bert, "sst", start=6, seed=7, targets="qv"))
    done = mbert("compare", *FEW, "--out", "two", here=home)
    assert done.code == 1
    assert "--keep" in done.err
    assert not (home / "two").exists()
    done = mbert("compare", *FEW, "--out", "two", "--keep", "adapters/more.safetensors", here=home)
    assert done.code == 0, done.err
    one, two = (json.loads((home / name / "table.json").read_text()) for name in ("comparison", "two"))
    assert one["comparison"] != two["comparison"]


def test_remainders_and_calibration_are_lines_with_names_of_their_own(home: Path) -> None:
    options = ("--private", "2", "--calibrate", "heads", "--calibrate-rows", "20")
    done = mbert("compare", *FEW, *options, here=home)
    assert done.code == 0, done.err
    names = {one["name"] for one in json.loads((home / "comparison/table.json").read_text())["standings"]}
    merges = {"fedavg + private 2", "ties + private 2"}
    assert names == {"ensemble"} | merges | {f"{name} + heads" for name in merges}
    markdown = (home / "comparison/table.md").read_text()
    assert all(name in markdown for name in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calibrate-rows", "9"), "--calibrate-rows"),
        (("--calibrate", "hats"), "hats"),
        (("--on", "held-out"), "without a record of which rows its training held out"),
        (("--on", "train"), "--on"),
        (("--texts", "sst"), "TASK=FILE"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(home: Path, words: tuple[str, ...], said: str) -> None:
    done = mbert("compare", *FEW, *words, here=home)
    assert done.code == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not (home / "comparison").exists()
