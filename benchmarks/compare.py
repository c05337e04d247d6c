"""Which merge works: every method on the shipped adapters, scored on rows of train that their training held out.

Usage: python -m benchmarks.compare --data DIR [--out FOLDER]

Nothing is measured on dev, so that what is chosen by this table can be reported on dev. Finished cells lie in FOLDER
and are not computed again.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import provenance, write_result

TASKS = ("sst", "para", "sts")
HELD = 400


def split(data: Path, folder: Path) -> None:
    """Write the rows of train that training keeps and those that it holds out as a folder of train and dev."""
    from mergekit_bert.data.rows import hold_out, tsv_text
    from mergekit_bert.data.source import load_rows
    from mergekit_bert.data.task import get_task
    from mergekit_bert.files import write_atomic
    from mergekit_bert.training.config import TrainConfig

    usual = TrainConfig()
    for name in TASKS:
        task = get_task(name)
        kept, held = hold_out(load_rows(task, "train", data), usual.hold_out, usual.hold_out_limit, usual.seed)
        for where, rows in (("train", kept), ("dev", held.take(range(min(HELD, len(held)))))):
            labels = rows.label_column().tolist()
            shown = labels if task.range is not None else [task.labels[int(label)] for label in labels]
            lines = [[*texts, label] for texts, label in zip(rows.texts, shown, strict=True)]
            write_atomic(folder / name / f"{where}.tsv", tsv_text([[*task.text, task.label], *lines]).encode())


def main(
    data: Annotated[Path, typer.Option(help="Folder with <task>/train.tsv.")],
    out: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = Path("comparison"),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "all",
) -> None:
    import mergekit_bert as mb
    from mergekit_bert.evaluation.contest import to_json
    from mergekit_bert.evaluation.tables import as_text, contest_table

    split(data, out / "held_out")
    files = [f"adapters/{task}.safetensors" for task in TASKS]
    chosen = None if methods == "all" else methods.split(",")
    contest = mb.compare(files, chosen, ["full", "core"], out / "held_out", out=out, progress=True)
    print(as_text(contest_table(contest.placed)), end="")
    for name, reason in contest.refused.items():
        print(f"left out {name}: {reason}")
    write_result("compare", {**provenance(), **to_json(contest)})
    picture = Path(__file__).parent / "results/compare.png"
    picture.write_bytes((out / "picture.png").read_bytes())


if __name__ == "__main__":
    typer.run(main)
