"""The main job on real text with default options: probes, full fine-tuning, adapters, and three compositions.

Usage: python -m benchmarks.real_text --data DIR [--out FOLDER] [--seed N]
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import provenance
from mergekit_bert.evaluation.records import read_record, record_path
from mergekit_bert.quickstart import MODELS, model_path, quickstart
from mergekit_bert.training.manifest import MANIFEST, run_folder

TASKS = ("sst", "para", "sts")


def main(
    data: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()] = Path("real"),
    seed: Annotated[int, typer.Option()] = 0,
    results: Annotated[Path, typer.Option()] = Path(__file__).parent / "results",
) -> None:
    grid = quickstart(str(data), "minilm", out, TASKS, seed)
    scores, seconds = [], {}
    for model in MODELS:
        for task in TASKS:
            path = model_path(out, model, task)
            record = read_record(record_path(path))
            assert record is not None
            scores += [{"model": model, **vars(score)} for score in record.scores if score.task == task]
            manifest = run_folder(path) / MANIFEST
            if manifest.exists():
                seconds[f"{model} {task}"] = json.loads(manifest.read_text())["wall_seconds"]
    overall = {model: grid.overall(model) for model in grid.models}
    told = {**provenance(), "seed": seed, "scores": scores, "overall": overall, "training_seconds": seconds}
    path = results / f"real_text_seed{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
