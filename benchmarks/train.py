"""Training speed beside PEFT with transformers' Trainer: same rows, same adapter sites and rank, same batch of 32 rows.

Usage: python -m benchmarks.train --data DIR [--quick]

Every measurement is a process of its own, so that peak memory is its own too; the sides take turns.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import matrix_rates, provenance, write_result

SIDES = {
    "adapter": ("mbert adapter", "mbert orthogonal", "peer adapter", "peer adapter+bf16+grouped"),
    "full": ("mbert full", "peer full"),
}
RATES = {"adapter": {"lr": 1e-3, "head_lr": 1e-3}, "full": {"lr": 5e-5, "head_lr": 5e-5}}
HELD = 400


def measure(side: str, task_name: str, data: str, count: int, seed: int) -> dict[str, Any]:
    """One training in this process."""
    import torch

    import mergekit_bert as mb
    from benchmarks import sides
    from mergekit_bert.data.batches import tokenise

    torch.set_num_threads(os.cpu_count() or 1)
    task = mb.get_task(task_name)
    rows = mb.load_rows(task, "train", data)
    rows = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist())
    held, rows = rows.take(range(HELD)), rows.take(range(HELD, HELD + count))
    who, kind = side.split()
    options = {**RATES["full" if kind == "full" else "adapter"], "seed": seed}
    trained = getattr(sides, f"train_{who}")(task, rows, held, options, kind)
    encoder = mb.load_encoder("minilm")
    tokens = tokenise(rows, task, encoder.tokenizer, sides.LENGTH, 0)
    lengths = [tokens.length(row) for row in range(len(tokens))]
    count = sides.operations(encoder, lengths, 6 if kind == "full" else 4, last_whole=who == "peer")
    return {**dataclasses.asdict(trained), "operations": count}


def child(side: str, task: str, data: Path, count: int, seed: int) -> dict[str, Any]:
    """One training in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--data", str(data), "--side", side, "--task", task]
    ran = subprocess.run(
        [*command, "--rows", str(count), "--seed", str(seed)], capture_output=True, text=True, check=False
    )
    if ran.returncode != 0:
        raise SystemExit(f"{side} on {task}: {ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main(
    data: Annotated[Path, typer.Option(help="Folder with sst/ and para/.")],
    task: Annotated[list[str] | None, typer.Option(help="sst and para by default.")] = None,
    work: Annotated[list[str] | None, typer.Option(help="adapter and full by default.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows.")] = 640,
    repeats: Annotated[int, typer.Option()] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat on few rows: under two minutes.")] = False,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
    seed: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    if side is not None:
        print(json.dumps(measure(side, (task or ["sst"])[0], str(data), rows, seed)))
        return
    if quick:
        task, rows, repeats = task or ["sst"], 320, 1
    import mergekit_bert as mb
    from benchmarks import sides

    rate = matrix_rates()
    console, told = Console(width=140), []
    for name in task or ["sst", "para"]:
        found_task = mb.get_task(name)
        apart = sides.check_same(found_task, mb.load_rows(found_task, "train", data).take(range(32)))
        console.print(f"{name}: with one adapter both sides give the same outputs (largest difference {apart:.1g})")
        for kind in work or SIDES:
            who = SIDES[kind]
            found: dict[str, list[dict[str, Any]]] = {one: [] for one in who}
            for number in range(repeats):
                for one in who if number % 2 else reversed(who):  # neither side is always first
                    found[one].append(child(one, name, data, rows, number))
                    console.print(f"{name} {one}: {found[one][-1]['seconds']:.1f} s ({number + 1} of {repeats})")
            told += [{"task": name, "work": kind, "side": one, "runs": runs} for one, runs in found.items()]
    table = Table("task", "side", "seconds", "spread", "× mbert", "score", "memory MiB", "share of bf16 rate")
    for entry in told:
        first = next(e for e in told if (e["task"], e["work"]) == (entry["task"], entry["work"]))
        seconds = [run["seconds"] for run in entry["runs"]]
        entry["seconds"], entry["ratio"] = (
            median(seconds),
            median(a["seconds"] / b["seconds"] for a, b in zip(entry["runs"], first["runs"], strict=True)),
        )
        entry["share"] = entry["runs"][0]["operations"] / entry["seconds"] / rate["bf16"]
        table.add_row(
            entry["task"],
            entry["side"],
            f"{entry['seconds']:.1f}",
            f"{min(seconds):.1f} to {max(seconds):.1f}",
            f"{entry['ratio']:.2f}",
            f"{median(run['score'] for run in entry['runs']):.3f}",
            f"{median(run['memory_bytes'] for run in entry['runs']) / 2**20:.0f}",
            f"{entry['share']:.0%}",
        )
    console.print(table)
    for entry in told:
        first = next(e for e in told if (e["task"], e["work"]) == (entry["task"], entry["work"]))
        apart = abs(fmean(r["score"] for r in entry["runs"]) - fmean(r["score"] for r in first["runs"]))
        noise = 2 * math.sqrt(2 * 0.25 / HELD)
        entry["score_apart"], entry["agrees"] = apart, apart < noise
        if not entry["agrees"]:
            console.print(
                f"{entry['task']} {entry['side']}: its score lies {apart:.3f} from mbert's (noise {noise:.3f})"
            )
    write_result(
        "train_quick" if quick else "_".join(["train", *(task or []), *(work or [])]),
        {**provenance(), "rows": rows, "rate": rate, "measured": told},
    )


if __name__ == "__main__":
    typer.run(main)
