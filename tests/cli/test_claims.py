"""Every command's output: one run at a time, no link replaced, and nothing lost that came in the meantime."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert import outputs
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.outputs import Output, held
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert, unchanged
from tests.corpus import write_corpus

SST, STS = "adapters/sst.safetensors", "adapters/sts.safetensors"
TRAIN = ("--task", "sst", "--base", "BASE", "--epochs", "1", "--hold-out", "0.2", "--precision", "fp32")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "predict": (("predict", SST, "good", "--out", "x.tsv"), "x.tsv"),
    "eval": (("eval", SST, "--json", "x.json"), "x.json"),
    "eval, table": (("eval", SST, "--markdown", "x.md"), "x.md"),
    "doctor": (("doctor", "--methods", "fedavg", "--json", "x.json"), "x.json"),
    "doctor, picture": (("doctor", "--methods", "fedavg", "--picture", "x.png"), "x.png"),
    "merge": (("merge", "--method", "fedavg", "--out", "x.safetensors"), "x.safetensors"),
    "merge, recipe": (("merge", "--method", "fedavg", "--out", "m.safetensors", "--save-recipe", "x.yml"), "x.yml"),
    "merge, folders": (("merge", "--method", "fedavg", "--out", "m.safetensors", "--dense", "x"), "x/sts"),
    "convert": (("convert", SST, "--to", "mbert", "--out", "x.safetensors"), "x.safetensors"),
    "convert to PEFT": (("convert", SST, "--to", "peft", "--out", "x"), "x"),
    "convert to folders": (("convert", SST, "--to", "hf", "--out", "x"), "x/sst"),
    "train-adapter": (("train-adapter", *TRAIN, "--type", "probe", "--out", "x.safetensors"), "x.safetensors"),
    "finetune": (("finetune", *TRAIN, "--out", "x"), "x"),
    "compare": (("compare", "--methods", "fedavg", "--spaces", "full", "--out", "x"), "x/table.json"),
}
TRAINING = ("train-adapter", "finetune")


@pytest.fixture
def home(bert: mb.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters in ``adapters/``, rows in ``data/``."""
    for place, task in enumerate(("sst", "sts")):
        one = random_adapter(bert, task, start=3 * place, seed=place, targets="qv")
        write_adapter(tmp_path / f"adapters/{task}.safetensors", one)
    write_corpus(tmp_path / "data", ("sst", "sts"), train=20, dev=10)
    return tmp_path


def words(name: str, bert: mb.Encoder) -> list[str]:
    return [str(bert.name) if word == "BASE" else word for word in COMMANDS[name][0]]


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[None]:
    """Have another thread hold ``path``."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with held(path):
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join(60)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_another_run_writes_is_told_in_one_line(home: Path, bert: mb.Encoder, name: str) -> None:
    path = home / "x" if name == "compare" else home / COMMANDS[name][1]
    with held_by_another(path), unchanged(home):
        done = mbert(*words(name, bert), "--force", here=home)
    assert done.code == 1
    assert "another mbert run is writing it" in done.err
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert not list(home.rglob(".*"))


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_dangling_link_is_never_replaced(home: Path, bert: mb.Encoder, name: str, force: tuple[str, ...]) -> None:
    link = home / COMMANDS[name][1]
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("nowhere")
    with unchanged(home):
        done = mbert(*words(name, bert), *force, here=home)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done.err
    assert "it exists already" in done.err
    assert os.readlink(link) == "nowhere"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "compare"])
def test_what_appears_in_the_meantime_stays_and_the_work_is_not_lost(
    home: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, really = home / COMMANDS[name][1], outputs.claimed

    @contextlib.contextmanager
    def claimed(*given: Output) -> Iterator[None]:
        with really(*given):
            if path in [home / one.path for one in given] and not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_text("theirs")
            yield

    for module in (outputs, sys.modules["mergekit_bert.api"]):
        monkeypatch.setattr(module, "claimed", claimed)
    done = mbert(*words(name, bert), here=home)
    assert (done.code, done.err.count("error: ")) == (1, 1), done.err
    assert path.read_text() == "theirs"
    kept = path.with_name(f"{path.name}.kept1")
    assert kept.exists() == (name not in TRAINING)
    if name not in TRAINING:
        assert f"the result is kept as {kept.relative_to(home)}" in done.err


def test_a_comparison_does_not_replace_what_has_appeared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_bert.evaluation import compare

    really = compare.comparison_rows

    def comparison_rows(*given: object) -> object:
        (home / "x/table.md").write_text("theirs")
        return really(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "comparison_rows", comparison_rows)
    done = mbert(*COMMANDS["compare"][0], here=home)
    assert (done.code, "x/table.md: results for other inputs or rows" in done.err) == (1, True), done.err
    assert (home / "x/table.md").read_text() == "theirs"
    assert not (home / "x/table.json").exists()


def test_folders_with_a_users_own_file_are_not_replaced(home: Path) -> None:
    merge = ("merge", "--method", "fedavg", "--out", "m.safetensors", "--dense", "x")
    for force in ((), ("--force",)):
        assert mbert(*merge, *force, here=home).code == 0
    (home / "x/sts/notes.txt").write_text("mine")
    with unchanged(home):
        done = mbert(*merge, "--force", here=home)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith("error: x/sts: it exists already and holds notes.txt, which mbert does not write there")


def test_a_merge_does_not_take_the_checkpoint_of_a_training_run(home: Path, bert: mb.Encoder) -> None:
    from mergekit_bert.tensorfile import write_tensors

    checkpoint = home / "x.run/checkpoint.safetensors"
    write_tensors(checkpoint, {}, {"format": 2, "kind": "checkpoint", "run": {"task": {}}, "progress": {}})
    before = checkpoint.read_bytes()
    done = mbert("merge", "--method", "adamerging", "--data", "data", "--out", "x.safetensors", here=home)
    assert (done.code, "the checkpoint of an unfinished training run" in done.err) == (1, True), done.err
    assert checkpoint.read_bytes() == before


def test_two_processes_with_one_output(home: Path, bert: mb.Encoder) -> None:
    command = [sys.executable, "-c", "from mergekit_bert.cli import main; main()", *words("train-adapter", bert)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    long = ("--epochs", "100000", "--patience", "100000", "--checkpoint-seconds", "0")
    log = home / "x.run/log.jsonl"
    with (
        (home / "first.txt").open("wb") as told,
        subprocess.Popen([*command, *long], cwd=home, env=env, stdout=told, stderr=told) as first,
    ):
        try:
            while first.poll() is None and not log.exists():
                time.sleep(0.05)
            assert first.poll() is None
            done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
            assert first.poll() is None, (home / "first.txt").read_text()
        finally:
            first.send_signal(signal.SIGKILL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: x.safetensors: another mbert run is writing it; ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in home.glob("*.safetensors")] == []
    again = mbert(*words("train-adapter", bert), here=home)  # the lock went with the process
    assert "an unfinished run" in again.err
    assert mbert(*words("train-adapter", bert), "--force", here=home).code == 0
    assert not [path.name for path in home.iterdir() if path.name.startswith(".")]
