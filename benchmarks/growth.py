"""Cost as work grows: tokens a second of a training step against length, batch size and rank; of mixed batches against
the number of adapters. One plot each.

Usage: python -m benchmarks.growth [--quick]

Rows are random tokens of one length, on the embedded encoder.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.machine import matrix_rates, provenance, write_result

LENGTHS = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 4, 8, 16, 32, 64, 128)
RANKS = (2, 4, 8, 16, 32, 64, 128)
ADAPTERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main(quick: Annotated[bool, typer.Option("--quick", help="Two steps a point.")] = False) -> None:
    import torch

    import mergekit_bert as mb
    from benchmarks import sides
    from mergekit_bert.adapters.basis import BasisRows
    from mergekit_bert.data.batches import Tokens
    from mergekit_bert.encoder.sites import find_sites
    from mergekit_bert.models.routing import Mixture
    from mergekit_bert.training.config import ADAPTER_RATES
    from mergekit_bert.training.loop import make_optimizer, step
    from mergekit_bert.training.supervised import Supervised, TrainingRun
    from mergekit_bert.training.trainable import adapter_trainable

    torch.set_num_threads(os.cpu_count() or 1)
    steps, encoder, task = (2 if quick else 8), mb.load_encoder("minilm"), mb.get_task("sst")
    sites = find_sites(encoder, "all-linear")

    def tokens_of(rows: int, length: int) -> Tokens:
        source = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (rows, length), generator=source).tolist()
        columns = {"input_ids": ids, "token_type_ids": [[0] * length] * rows}
        return Tokens(
            columns, [(len(ids),) for ids in columns["input_ids"]], (0.0,) * rows, 0, dict.fromkeys(columns, 0), task
        )

    def rate(run: Callable[[], object], tokens: int) -> float:
        times = []
        for number in range(steps + 1):
            start = time.perf_counter()
            run()
            if number:
                times.append(time.perf_counter() - start)
        return tokens / median(times)

    def train(rows: int, length: int, rank: int) -> float:
        tokens = tokens_of(rows, length)
        config = mb.TrainConfig(precision="bf16", max_length=512, batch_size=rows)
        work = adapter_trainable(
            encoder, task, "lora", mb.AdapterConfig(rank=rank), sites, BasisRows(0, 0, rank), config
        )
        objective = Supervised(
            work, TrainingRun(task, tokens, tokens, config, *ADAPTER_RATES, torch.bfloat16, Path(), {})
        )
        optimizer = make_optimizer(objective)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return rate(lambda: step(objective, optimizer, 0), rows * length)

    def mixed(count: int) -> float:
        trained = sides.shipped_one("sst")
        parts = [trained.part("sst")] * count
        parts = [
            dataclasses.replace(
                part,
                deltas={site: dataclasses.replace(d, B=d.B.clone(), A=d.A.clone()) for site, d in part.deltas.items()},
            )
            for part in parts
        ]
        tokens, mixture = tokens_of(256, 24), Mixture(encoder, parts)
        owners = [row % count for row in range(256)]
        return rate(lambda: mixture.outputs(tokens, owners), 256 * 24)

    told: dict[str, dict[int, float]] = {
        "length": {length: train(max(1, 2048 // length), length, 12) for length in LENGTHS},
        "batch": {rows: train(rows, 32, 12) for rows in BATCHES},
        "rank": {rank: train(32, 32, rank) for rank in RANKS},
        "adapters": {count: mixed(count) for count in ADAPTERS},
    }
    draw(told, Path(__file__).parent / "results" / ("growth_quick.png" if quick else "growth.png"))
    for name, points in told.items():
        print(name, {x: round(y) for x, y in points.items()})
    result: dict[str, Any] = {**provenance(), "rate": matrix_rates(), "tokens_per_second": told}
    write_result("growth_quick" if quick else "growth", result)


def draw(told: dict[str, dict[int, float]], path: Path) -> None:
    """One plot for each of the four."""
    titles = {
        "length": "training, by tokens a row (2,048 tokens a step)",
        "batch": "training, by rows a step (32 tokens each)",
        "rank": "training, by rank (32 rows of 32 tokens)",
        "adapters": "256 rows of 24 tokens, by number of adapters",
    }
    picture = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (name, points) in zip(picture.subplots(2, 2).flat, told.items(), strict=True):
        axes.plot(list(points), [value / 1000 for value in points.values()], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(points), list(map(str, points)))
        axes.set_ylim(bottom=0)
        axes.set_title(titles[name], fontsize=10)
        axes.set_ylabel("thousand tokens a second")
    FigureCanvasAgg(picture).print_png(path)


if __name__ == "__main__":
    typer.run(main)
