"""A few hundred spoiled files: every one is refused in one line or does no harm, and a planted bug is found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.formats import FORMATS

COUNT = 240


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a run in a process of its own gave."""
    command = [sys.executable, "-m", "tests.fuzz.small", str(COUNT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr[-4000:]
    value: dict[str, Any] = json.loads(ran.stdout)
    return value


def test_a_spoiled_file_is_refused_in_one_line_or_does_no_harm(told: dict[str, Any]) -> None:
    lines = [
        f"{one['verdict']} ({one['count']}) {one['file']}, {one['change']}: {one['error']} {one['at']}\n"
        f"    python -m benchmarks.fuzz --case {one['cases'][0]}"
        for one in told["findings"]
    ]
    assert lines == [], "\n" + "\n".join(lines)


def test_the_cases_reach_deep(told: dict[str, Any]) -> None:
    assert told["formats"].keys() == FORMATS.keys()
    assert told["cases"] >= COUNT - len(FORMATS)
    assert told["verdicts"]["changed"] > 0.1 * told["cases"]
    for name, one in told["formats"].items():
        if FORMATS[name].digest:
            assert one["first_stage"] < 0.85 * one["cases"], f"{name}: nearly all are stopped at the door"
    sealed = told["mutations"]["sealed metadata"]
    assert sum(sealed.values()) > 0.1 * told["cases"]
    every = [verdicts for name, verdicts in told["mutations"].items() if name.startswith("sealed")]
    assert sum(verdicts.get("changed", 0) for verdicts in every) > 0
    assert sealed.get("same", 0) < 0.3 * sum(sealed.values())
    assert sum(one["reasons"] for one in told["formats"].values()) > 60


def test_planted_bugs_are_found(told: dict[str, Any]) -> None:
    for name, one in told["planted"].items():
        assert one.get("verdict") == one["expected"], name
        assert one["told"], "what was changed is said"
    planted = told["planted"]
    assert "ZeroDivisionError" in planted["a field that is trusted"]["error"]
    assert "SIGSEGV" in planted["an address that is trusted"]["error"]
    assert "in take" in planted["a pattern that takes for ever"]["trace"], "the stack of a case that hangs is told"


def test_a_case_can_be_repeated(told: dict[str, Any]) -> None:
    assert len(told["repeated"]) == 20
    assert all(told["repeated"])
