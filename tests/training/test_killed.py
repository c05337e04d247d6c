"""Killed runs: at random moments, and at every write; resumed, they end in the same files."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny
from tests.training.runs import everything, log, manifest, without_seconds

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Killed:
    """The folder of the runs, and by kind what the killing program tells."""

    folder: Path
    told: dict[str, dict[str, Any]]
    stderr: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """All runs, killed and resumed in a process of their own."""
    folder = tmp_path_factory.mktemp("killed")
    write_tiny(folder / "base", "bert")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Killed(folder, json.loads(done.stdout.splitlines()[-1]), done.stderr)


def model_bytes(out: Path) -> bytes:
    return (out / "model.safetensors" if out.is_dir() else out).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(killed: Killed, kind: str) -> None:
    codes = killed.told[kind]["codes"]
    assert codes.count(-signal.SIGKILL) >= 5, killed.stderr
    assert set(codes) <= {0, -signal.SIGKILL}, killed.stderr
    assert codes[-1] == 0, killed.stderr
    whole, resumed = (killed.folder / kind / "random" / name / "a" for name in ("whole", "killed"))
    assert model_bytes(resumed) == model_bytes(whole)
    steps = [event["step"] for event in log(resumed) if "loss" in event]
    assert steps == list(range(10, 161, 10))
    assert [event["epoch"] for event in log(resumed) if "train_loss" in event] == list(range(10))
    assert without_seconds(log(resumed)) == without_seconds(log(whole))
    assert manifest(resumed)["history"] == manifest(whole)["history"]
    assert manifest(resumed)["sha256"] == manifest(whole)["sha256"]
    assert sorted(everything(resumed.parent)) == sorted(everything(whole.parent))
    assert not [name for name in everything(resumed.parent) if ".part" in name or "checkpoint" in name]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_killed_at_every_write_ends_in_the_same_files(killed: Killed, kind: str) -> None:
    assert killed.told[kind]["calls"] > 10
    assert killed.told[kind]["wrong"] == []
