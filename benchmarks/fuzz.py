"""Spoil files of every format that mbert reads: each must be refused in one line, or do no harm.

Usage: python -m benchmarks.fuzz [--cases N] [--seed N] [--workers N] [--only FORMAT] [--case FORMAT:NUMBER]
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import provenance, write_result
from tests.fuzz.bench import BAD, Bench
from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import run
from tests.fuzz.report import summary, table


def main(
    cases: Annotated[int, typer.Option()] = 20_000,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option()] = os.cpu_count() or 1,
    only: Annotated[list[str] | None, typer.Option(help="Formats; nothing is recorded.")] = None,
    case: Annotated[str | None, typer.Option(help="One case, with its traceback.")] = None,
) -> None:
    """Run the cases, print the counts and what was bad, and record both."""
    start = time.monotonic()
    chosen = [case.partition(":")[0]] if case else only or list(FORMATS)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), seed, [FORMATS[one] for one in chosen])
        outcomes = []
        wanted = [case] if case else bench.cases(cases)
        for number, outcome in enumerate(run(bench, wanted, workers), start=1):
            outcomes.append(outcome)
            if outcome.verdict in BAD and not case:
                print(f"{outcome.case}: {outcome.verdict} {outcome.error} {outcome.at}", file=sys.stderr)
            if number % 500 == 0:
                print(f"{number} of {len(wanted)} cases", file=sys.stderr, flush=True)
    if case:
        one = outcomes[0]
        print(f"{one.case}: {one.file} ({one.specimen}), {one.mutation}: {one.told}\n{one.trace}{one.error}")
        print(f"{one.verdict} in the stage {one.stage!r} after {one.seconds} s")
        raise SystemExit(one.verdict in BAD)
    told = summary(outcomes)
    print(table(told))
    if only is None:
        write_result("fuzz", {**provenance(), "seed": seed, "seconds": round(time.monotonic() - start), **told})
    raise SystemExit(any(told["verdicts"][verdict] for verdict in BAD))


if __name__ == "__main__":
    typer.run(main)
