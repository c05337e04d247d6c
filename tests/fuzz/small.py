"""A program that spoils files of every format and looks for bugs that it plants: ``python -m tests.fuzz.small COUNT``.

It prints one JSON line. It is a process of its own, since it forks, and since the type checker that the tests install
would refuse many odd values before the package does.
"""

import ctypes
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mergekit_bert.adapters.ledger import LEDGER, Ledger
from mergekit_bert.formats import file
from tests.fuzz import harness, models
from tests.fuzz.bench import Bench, Outcome
from tests.fuzz.containers import taken_apart, tensors_in
from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import run
from tests.fuzz.report import summary


def trusting(wrong: Callable[[Any], object]) -> Callable[..., Any]:
    """``Ledger.take``, which first does something ``wrong`` with the seed in the file unless it is the usual one."""
    really = Ledger.take

    def take(ledger: Ledger, *arguments: Any) -> Any:
        text = ledger.path.read_text(errors="replace")
        seed = re.search(r'"seed": ?([^,}]*)', text)
        if ledger.path.name == LEDGER and seed is not None and seed[1] != "0":
            wrong(seed[1])
        return really(ledger, *arguments)

    return take


def unchecked(path: Path, old: bool = False) -> tuple[dict[str, Any], Any]:
    """``read_tensors`` that looks at no digest."""
    apart = taken_apart(path.read_bytes())
    assert apart is not None
    told = json.loads(apart[0]["__metadata__"]["mbert"])
    for key in ("digest", "sha256"):
        told.pop(key, None)
    return tensors_in(path.read_bytes()), told


PLANTED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a field that is trusted": ("crash", lambda seed: len(seed) // 0),
    "a pattern that takes for ever": ("hang", lambda seed: re.match(r"(a+)+$", "a" * 64 + "!")),
    "a size that is trusted": ("memory", lambda seed: bytearray(2**40)),
    "an address that is trusted": ("crash", lambda seed: ctypes.string_at(0)),
}


def planted(bench: Bench) -> dict[str, dict[str, Any]]:
    """The first case that shows each planted bug, and the same case once more."""
    found = {}
    for name, (verdict, wrong) in PLANTED.items():
        with patch.object(Ledger, "take", trusting(wrong)), patch.object(harness, "CPU_SECONDS", 1.0):
            found[name] = _first(bench, "ledger", verdict)
    with patch.object(file, "read_tensors", unchecked), patch.object(models, "read_tensors", unchecked):
        found["a digest that is not looked at"] = _first(bench, "adapter", "tampered")
    return found


def _first(bench: Bench, format: str, verdict: str) -> dict[str, Any]:
    cases = [f"{format}:{number}" for number in range(200)]
    shown = next((one for one in run(bench, cases) if one.verdict == verdict), None)
    return {"expected": verdict} | (dataclasses.asdict(shown) if shown is not None else {})


def main(count: int) -> dict[str, Any]:
    """What ``count`` cases gave, what was found of the planted bugs, and some cases twice."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 0, FORMATS.values())
        cases = bench.cases(count)
        outcomes = list(run(bench, cases))
        told = summary(outcomes)
        again = [_same(one) for one in run(bench, cases[:20])]
        first = {one.case: _same(one) for one in outcomes}
        told |= {"planted": planted(bench), "repeated": [one == first[one["case"]] for one in again]}
        return told


def _same(one: Outcome) -> dict[str, Any]:
    """What two runs of a case share: all but the time."""
    return {**dataclasses.asdict(one), "seconds": None}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
