"""A folder of tiny rows, as a user would have it."""

import csv
from collections.abc import Sequence
from pathlib import Path

from mergekit_bert.data.task import Task, get_task
from tests.tiny import tiny_rows


def write_rows(path: Path, task: Task, count: int, seed: int, labelled: bool = True) -> Path:
    """Write tiny rows of ``task`` as a TSV."""
    rows = tiny_rows(task, count, seed)
    assert rows.labels is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow([*task.text, *([task.label] if labelled else [])])
        for texts, label in zip(rows.texts, rows.labels, strict=True):
            shown = task.labels[int(label)] if task.range is None else label
            writer.writerow([*texts, *([shown] if labelled else [])])
    return path


def write_corpus(folder: Path, tasks: Sequence[str | Task], train: int = 60, dev: int = 30) -> Path:
    """Write ``folder/<task>/{train,dev}.tsv``; returns the folder."""
    for one in tasks:
        task = get_task(one)
        write_rows(folder / task.name / "train.tsv", task, train, 0)
        write_rows(folder / task.name / "dev.tsv", task, dev, 1)
    return folder


def read_tsv(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
