"""Evaluation of three tasks from one file, beside PEFT with ``Trainer.predict`` for each task.

Usage: python -m benchmarks.inference --data DIR [--quick]

Both sides have the base in memory, and go from texts to scores: mbert with one ensemble file, PEFT with an adapter
folder's worth of weights for each task. The sides take turns; their outputs are compared first.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import matrix_rates, provenance, write_result

TASKS = ("sst", "para", "sts")


def main(
    data: Annotated[Path, typer.Option(help="Folder with sst/, para/ and sts/.")],
    count: Annotated[int, typer.Option("--rows", help="Rows a task.")] = 1000,
    repeats: Annotated[int, typer.Option()] = 5,
    quick: Annotated[bool, typer.Option("--quick")] = False,
) -> None:
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    import mergekit_bert as mb
    from benchmarks import sides
    from mergekit_bert.encoder.pretrained import quiet_transformers

    if quick:
        count, repeats = 200, 1
    torch.set_num_threads(os.cpu_count() or 1)
    encoder, rate = mb.load_encoder("minilm"), matrix_rates()
    adapters = [sides.shipped_one(task) for task in TASKS]
    rows = {one.name: mb.load_rows(one.task, "dev", data) for one in adapters}
    rows = {name: one.take(range(min(count, len(one)))) for name, one in rows.items()}
    ensemble = mb.merge(adapters, "ensemble")
    peers = {one.name: sides.peft_of(one) for one in adapters}

    def ours() -> dict[str, np.ndarray]:
        predictor = mb.predictor(ensemble, base=encoder)
        return {name: predictor.outputs(name, some) for name, some in rows.items()}

    def theirs(batch: int) -> Callable[[], dict[str, np.ndarray]]:
        def run() -> dict[str, np.ndarray]:
            found = {}
            for one in adapters:
                with quiet_transformers():
                    arguments = TrainingArguments(
                        output_dir="unused",
                        per_device_eval_batch_size=batch,
                        use_cpu=True,
                        report_to=[],
                        disable_tqdm=True,
                    )
                    trainer = Trainer(
                        model=peers[one.name], args=arguments, data_collator=DataCollatorWithPadding(encoder.tokenizer)
                    )
                    outputs = trainer.predict(sides.encoded(encoder.tokenizer, one.task, rows[one.name])).predictions
                low, high = one.task.range or (0.0, 1.0)
                found[one.name] = np.asarray(outputs) if one.task.range is None else low + (high - low) * outputs
            return found

        return run

    ways: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "mbert, one ensemble file": ours,
        "PEFT + Trainer.predict, defaults (8 rows a batch)": theirs(8),
        "PEFT + Trainer.predict, 64 rows a batch": theirs(64),
    }
    console, seconds = Console(width=140), {name: list[float]() for name in ways}
    for number in range(repeats + 1):  # the first round is to warm up and to compare
        first: dict[str, np.ndarray] = {}
        for name, way in ways.items():
            start = time.perf_counter()
            found = way()
            if number:
                seconds[name].append(time.perf_counter() - start)
            first = first or found
            for task, outputs in found.items():
                apart = float(np.abs(outputs - first[task]).max() / np.abs(first[task]).max())
                if not apart < 1e-3:
                    raise SystemExit(f"{name}: outputs of {task} differ by {apart:.2g}")
    table = Table("way", "seconds", "spread", "× mbert", "rows a second")
    told: list[dict[str, Any]] = []
    total = sum(map(len, rows.values()))
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, seconds[next(iter(ways))], strict=True))
        told.append({"way": name, "seconds": times, "ratio": ratio, "rows_per_second": total / median(times)})
        spread = f"{min(times):.1f} to {max(times):.1f}"
        table.add_row(name, f"{median(times):.2f}", spread, f"{ratio:.2f}", f"{total / median(times):.0f}")
    console.print(table)
    write_result("inference_quick" if quick else "inference", {**provenance(), "rate": rate, "measured": told})


if __name__ == "__main__":
    typer.run(main)
