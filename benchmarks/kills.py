"""Kill a training run and a merge at random moments: every resume must end in the same bytes, nothing broken be left.

Usage: python -m benchmarks.kills [--kills N] [--seed N] [--base BASE]
"""

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import provenance
from mergekit_bert.errors import MbertError
from mergekit_bert.formats.file import read_model

TRAIN = [
    "train-adapter",
    "--task",
    "sts",
    "--data",
    "sample",
    "--epochs",
    "1",
    "--threads",
    "1",
    "--checkpoint-seconds",
    "2",
]


def mbert(*arguments: str) -> list[str]:
    """The command line of this installation."""
    return [sys.executable, "-c", "from mergekit_bert.cli import main; main()", *arguments]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed(command: list[str], folder: Path, after: float) -> bool:
    """Run ``command`` in ``folder`` and kill it ``after`` seconds; whether it was still running."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def leftovers(folder: Path) -> list[str]:
    """Half-written files."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.part")]


def check_broken(folder: Path) -> None:
    """Every model file present must be whole."""
    for path in folder.rglob("*.safetensors"):
        if path.parent.suffix != ".run":
            try:
                read_model(path)
            except MbertError as error:
                raise SystemExit(f"broken file: {error}") from error


def training_kills(train: list[str], kills: int, source: random.Random, folder: Path) -> dict[str, object]:
    """One run killed ``kills`` times against one that is left alone."""
    calm, wild = folder / "calm", folder / "wild"
    calm.mkdir()
    wild.mkdir()
    started = time.monotonic()
    subprocess.run(mbert(*train), cwd=calm, check=True, capture_output=True)
    whole = time.monotonic() - started
    struck = 0
    while struck < kills:
        print(f"training: {struck} of {kills} kills", file=sys.stderr, flush=True)
        struck += killed(mbert(*train, "--resume"), wild, source.uniform(0.2, 1.0) * whole)
        check_broken(wild)
        if (wild / "adapters" / "sts.safetensors").exists() and not (wild / "adapters" / "sts.run").exists():
            raise SystemExit("an output without its run")
        if (wild / "adapters" / "sts.scores.json").exists():  # it came through: compare, and begin anew
            compare(calm, wild)
            subprocess.run(["rm", "-rf", "adapters"], cwd=wild, check=True)
    subprocess.run(mbert(*train, "--resume"), cwd=wild, check=True, capture_output=True)
    compare(calm, wild)
    return {"kills": struck, "sha256": digest(calm / "adapters" / "sts.safetensors"), "seconds_undisturbed": whole}


def compare(calm: Path, wild: Path) -> None:
    """The killed run's file must equal the undisturbed one's, with nothing left over."""
    one, two = (digest(folder / "adapters" / "sts.safetensors") for folder in (calm, wild))
    if one != two:
        raise SystemExit(f"resumed bytes differ: {one} and {two}")


def merge_kills(kills: int, source: random.Random, folder: Path) -> dict[str, object]:
    """A merge killed ``kills`` times; the file must be absent or whole, and the merge done after it the same."""
    adapter = folder / "calm" / "adapters" / "sts.safetensors"
    command = mbert("merge", str(adapter), "--method", "fedavg", "--force")
    started = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    whole, expected = time.monotonic() - started, digest(folder / "merged.safetensors")
    struck = 0
    while struck < kills:
        print(f"merge: {struck} of {kills} kills", file=sys.stderr, flush=True)
        struck += killed(command, folder, source.uniform(0.5, 1.0) * whole)
        if digest(folder / "merged.safetensors") != expected:
            raise SystemExit("a killed merge changed the file")
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    left = [name for name in leftovers(folder) if "merged" in name]
    if digest(folder / "merged.safetensors") != expected or left:
        raise SystemExit(f"after the kills: other bytes, or leftovers {left}")
    return {"kills": struck, "sha256": expected}


def main(
    kills: Annotated[int, typer.Option()] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    base: Annotated[str, typer.Option(help="An encoder; a tiny one makes it quick.")] = "minilm",
) -> None:
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = {
            **provenance(),
            "seed": seed,
            "training": training_kills([*TRAIN, "--base", base], kills, source, folder),
        }
        told["merge"] = merge_kills(kills, source, folder)
    print(json.dumps(told, indent=2, sort_keys=True))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "kills.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
