"""A program that trains in children, kills them, and resumes until a run is done: ``python -m tests.training.killed``.

It prints one JSON line. It is a process of its own, so that it can fork with nothing else running in it.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.training.manifest import Control
from tests.training.runs import train, tune


def run(kind: str, encoder: Encoder, out: Path, resume: bool, long: bool) -> None:
    """One run, with a checkpoint after every step: several hundred steps if ``long``, else two."""
    options: dict[str, Any] = {"rows": 160, "epochs": 10, "patience": 10} if long else {"rows": 10, "epochs": 2}
    control = Control(show=False, resume=resume)
    make = tune if kind == "full" else train
    make(encoder, out, control=control, head_dropout=0.2, checkpoint_seconds=0.0, **options)


def child(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_random(kind: str, encoder: Encoder, folder: Path, kills: int) -> dict[str, Any]:
    """Kill at ``kills`` moments drawn by a seed, then let it end."""
    out, source, codes = folder / "killed" / "a", random.Random(kind), []
    start = time.monotonic()
    if ended(child(lambda: run(kind, encoder, folder / "whole" / "a", False, True))) != 0:
        raise SystemExit("the uninterrupted run failed")
    whole = time.monotonic() - start
    for _ in range(kills):
        pid = child(lambda: run(kind, encoder, out, True, True))
        time.sleep(source.uniform(0.03, whole / kills))
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
    codes.append(ended(child(lambda: run(kind, encoder, out, True, True))))
    return {"codes": codes}


_CALLS = ("link", "rename", "replace", "unlink", "fsync")


def _kill_at(number: int) -> None:
    """Have this process killed just before its ``number``-th call that moves, removes or flushes a file."""
    count = 0

    def wrap(really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*arguments, **options)

        return call

    for name in _CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def at_every_write(kind: str, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Kill before the first call that changes a file, the second, …, and resume after each; what was not the same."""
    whole, out, number = folder / "whole" / "a", folder / "killed" / "a", 0
    wrong: list[list[Any]] = []
    if ended(child(lambda: run(kind, encoder, whole, False, False))) != 0:
        raise SystemExit("the uninterrupted run failed")
    expected = contents(whole.parent)

    def cut() -> None:
        _kill_at(number)
        run(kind, encoder, out, False, False)

    while True:
        number += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        code = ended(child(cut))
        if code == 0:
            return {"calls": number - 1, "wrong": wrong}
        again = ended(child(lambda: run(kind, encoder, out, True, False)))
        if (code, again) != (-signal.SIGKILL, 0) or contents(out.parent) != expected:
            wrong.append([number, code, again, sorted(contents(out.parent))])


def contents(folder: Path) -> dict[str, str]:
    """Files below ``folder``: the bytes of models, of all else the name alone (times differ)."""
    return {
        str(path.relative_to(folder)): path.read_bytes().hex() if path.name in ("a", "model.safetensors") else ""
        for path in folder.rglob("*")
        if path.is_file()
    }


def main(folder: Path) -> dict[str, dict[str, Any]]:
    """Both ways of killing, for an adapter and for full fine-tuning."""
    torch.set_num_threads(1)
    encoder = load_encoder(folder / "base")
    results: dict[str, dict[str, Any]] = {}
    for kind in ("lora", "full"):
        run(kind, encoder, folder / kind / "first" / "a", False, False)  # imports what children then need not
        results[kind] = at_random(kind, encoder, folder / kind / "random", 8)
        results[kind] |= at_every_write(kind, encoder, folder / kind / "writes")
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
