"""Sets of adapters to merge: several tasks, several seeds, with and without the orthogonal basis.

Usage: python -m benchmarks.adapters --data DIR --out FOLDER

Writes FOLDER/<set>/<task>.safetensors with Gram matrices, all by the default options but for what the set's name says.
Of para the first 8,000 rows of train are used, half of them, and cfimdb's long texts are cut to 128 tokens, since
this is done many times. What is there is not trained again.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.derived import rows_of, task_of

TASKS = ("sst", "para", "sts", "cfimdb")
"""In this order they avoid each other; the derived ones, asks and polar, are trained where they are named."""
MOST_ROWS = 8000
CUT = {"cfimdb": 128}
SETS: Mapping[str, Mapping[str, Any]] = {
    **{
        f"{basis}_{seed}": {"adapter": {"basis": basis}, "train": {"seed": seed}}
        for seed in (0, 1, 2)
        for basis in ("orthogonal", "random")
    },
    **{
        f"{basis}-{heads}_{seed}": {"adapter": {"basis": basis}, "train": {"seed": seed}, "heads": heads}
        for seed in (0, 1, 2)
        for basis in ("orthogonal", "random")
        for heads in ("mean", "apart")
    },
    "avoid_0": {"avoid": True},
    "decay_0": {"train": {"weight_decay": 3.0}},
    "attention_0": {"adapter": {"targets": "attention"}},
}
"""``heads``: mean for all tasks, or apart: matching for those of two texts, mean for the others. ``avoid``: from the
second task on, a basis that avoids the tasks before it (OSRM). With the orthogonal basis weight decay is a penalty of
the Delta's norm."""


def head_of(heads: str, task: str) -> str:
    """The head of a task in a set of such ``heads``."""
    return "matching" if heads == "apart" and len(task_of(task).text) == 2 else "mean"


def main(
    data: Annotated[Path, typer.Option(help="Folder with <task>/train.tsv.")],
    out: Annotated[Path, typer.Option(help="Where the sets go.")],
    sets: Annotated[str, typer.Option(help="Sets, separated by commas.")] = ",".join(SETS),
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = ",".join(TASKS),
) -> None:
    import mergekit_bert as mb
    from mergekit_bert.data.readers import tsv_text
    from mergekit_bert.files import write_atomic

    encoder = mb.load_encoder("minilm")
    for name in tasks.split(","):
        task = task_of(name)
        rows = rows_of(name, "train", data)
        rows = rows.take(range(min(MOST_ROWS, len(rows))))
        labels = rows.label_column(task).tolist()
        shown = labels if task.range is not None else [task.labels[int(label)] for label in labels]
        lines = [[*texts, label] for texts, label in zip(rows.texts, shown, strict=True)]
        write_atomic(out / "data" / name / "train.tsv", tsv_text([[*task.text, task.label], *lines]).encode())
    for chosen in sets.split(","):
        options = SETS[chosen]
        for name in tasks.split(","):
            path = out / chosen / f"{name}.safetensors"
            if path.exists():
                continue
            cut: dict[str, Any] = {"max_length": CUT[name]} if name in CUT else {}
            before = TASKS[: TASKS.index(name)] if options.get("avoid") else ()
            avoided = [path.parent / f"{other}.safetensors" for other in before]
            basis: dict[str, Any] = {"basis": "avoid"} if avoided else {}
            head: dict[str, Any] = {"head": head_of(options["heads"], name)} if "heads" in options else {}
            mb.train_adapter(
                task_of(name),
                out / "data",
                path,
                base=encoder,
                adapter=dataclasses.replace(mb.AdapterConfig(), **options.get("adapter", {}), **basis),
                train=dataclasses.replace(mb.TrainConfig(), **cut, **head, **options.get("train", {})),
                resume=True,
                with_stats=["gram"],
                avoid=avoided,
                progress=True,
            )


if __name__ == "__main__":
    typer.run(main)
