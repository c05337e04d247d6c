"""Where rows come from: a folder, the sample, the caller's tables, the folder ``data/``, or the Hugging Face Hub.

It never falls back silently to the generated sample. Unlabelled rows may also come from plain text files, or be
synthetic.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import InstanceOf

from mergekit_bert.arguments import Location, checked
from mergekit_bert.data import sample
from mergekit_bert.data.given import Data, Tables, given_data, rows_of
from mergekit_bert.data.readers import missing_column, tsv_text
from mergekit_bert.data.rows import Rows, columns_of, find_file, parse_rows, read_rows, read_texts
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.errors import DataError, MissingExtraError
from mergekit_bert.registry import unknown

SAMPLE = "sample"
SYNTHETIC, _EARLIER_NAME = "synthetic", "invented"
"""Texts that :mod:`~mergekit_bert.data.synthetic` generates. They have neither labels nor splits, so none are loaded.
Existing scripts may use the earlier name."""
DEFAULT_FOLDER = Path("data")
SPLITS = ("train", "dev")
_THREE_WAYS = "give `data=DIR`, use `data=sample`, or install mbert[hub] on a machine that reaches the Hub"


def is_synthetic(data: object) -> bool:
    """Whether ``data`` stands for synthetic texts."""
    return str(data) in (SYNTHETIC, _EARLIER_NAME)


@checked
def load_rows(task: str | Path | InstanceOf[Task], split: str, data: Any = None, labelled: bool = True) -> Rows:
    """The rows of ``task`` for ``split`` (``train`` or ``dev``); raises DataError or MissingExtraError.

    ``data`` is a folder, ``"sample"``, or rows in any form that :func:`~mergekit_bert.data.given.rows_of` takes. Unless
    ``labelled``, labels are not read and need not be there.
    """
    if split not in SPLITS:
        raise unknown("split", split, list(SPLITS))
    task = get_task(task)
    data = given_data("data", data, [task], split)
    if isinstance(data, Tables):
        return data.rows(task, split, labelled)
    if is_synthetic(data):
        raise DataError(
            "`data=synthetic`",
            f"texts that have no labels, which are for merging alone, where {split} rows of {task.name!r} are needed",
            f"a folder that holds {task.name}/{split}.tsv",
            "give `data=DIR` (or `data=sample`)",
        )
    named = dict(task.files).get(split)
    if named is not None:
        _refuse_two_places(task, split, named, data)
        return read_rows(Path(named), task, labelled)
    if data is not None and str(data) == SAMPLE:
        return _sample_rows(task, split, labelled)
    if data is not None:
        return _folder_rows(task, split, Path(data), labelled)
    if (DEFAULT_FOLDER / task.name).is_dir():
        return _folder_rows(task, split, DEFAULT_FOLDER, labelled)
    return _hub_rows(task, split, labelled)


def unlabelled_rows(task: Task, data: Data, texts: Mapping[str, Any]) -> Rows:
    """Rows of ``task`` without labels: those among ``texts`` (by task: a plain text file, or rows), or of ``train``."""
    if task.name in texts:
        given = texts[task.name]
        if isinstance(given, str | Path):
            return read_texts(Path(given), task)
        return rows_of(f"`texts`, {task.name}", given, task, labelled=False)
    if texts and (data is None or not has_rows(task, "train", data)):
        raise DataError(
            f"rows of the task {task.name!r}",
            "none" if data is None else f"none in {data}",
            f"{task.name}/train.tsv in `data=DIR`, or plain texts",
            f"give `data=DIR`, or `texts={task.name}=FILE`",
        )
    return load_rows(task, "train", data, labelled=False)


def _refuse_two_places(task: Task, split: str, named: str, data: str | Path | None) -> None:
    other = find_file(Path(data) / task.name, split) if data is not None and str(data) != SAMPLE else None
    if other is not None and other.resolve() != Path(named).resolve():
        raise DataError(
            f"rows of the task {task.name!r}",
            f"{named} (the task's files) and {other} (`data`)",
            f"one file for the split {split!r}",
            "drop `data`, or the key files",
        )


def has_rows(task: Task, split: str, data: Data = None) -> bool:
    """Whether there is such a split at all (a Hub task is taken to have both)."""
    if isinstance(data, Tables):
        return data.has(task, split)
    if split in dict(task.files):
        return True
    if data is not None and str(data) == SAMPLE:
        return task.name in sample.SAMPLE_TASKS
    folder = Path(data) if data is not None else DEFAULT_FOLDER
    if data is not None or (folder / task.name).is_dir():
        return find_file(folder / task.name, split) is not None
    return task.hub is not None and not task.files


def _folder_rows(task: Task, split: str, folder: Path, labelled: bool) -> Rows:
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", f"a folder that holds {task.name}/{split}.tsv", "check `data`")
    path = find_file(folder / task.name, split)
    if path is None:
        raise DataError(
            str(folder / task.name),
            f"no file for the split {split!r}",
            f"{split}.tsv, .csv, .jsonl or .parquet",
            "add it, or name another folder",
        )
    return read_rows(path, task, labelled)


def _sample_rows(task: Task, split: str, labelled: bool) -> Rows:
    if task.name not in sample.SAMPLE_TASKS:
        raise DataError(
            "`data=sample`",
            f"no rows for the task {task.name!r}",
            f"one of {', '.join(sample.SAMPLE_TASKS)}",
            "give `data=DIR` for this task",
        )
    records = (
        (f"row {number}", {**dict(zip(task.text, texts, strict=True)), task.label: label})
        for number, (texts, label) in enumerate(sample.generate(task.name, split), start=1)
    )
    return parse_rows(f"sample {task.name} {split}", records, task, labelled)


def _hub_rows(task: Task, split: str, labelled: bool) -> Rows:
    where = f"data for the task {task.name!r}"
    if task.hub is None:
        raise DataError(
            where,
            f"no folder {DEFAULT_FOLDER}/{task.name} and no place on the Hub",
            f"{task.name}/{split}.tsv",
            "give `data=DIR`",
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            where, f"no folder {DEFAULT_FOLDER}/{task.name} and no package datasets", "rows from somewhere", _THREE_WAYS
        ) from error
    try:
        table = datasets.load_dataset(task.hub.path, task.hub.config, split=task.hub.splits[split])
        table = table.rename_columns(task.hub.columns)
    except Exception as error:  # the Hub's client raises errors of many libraries
        found = " ".join(str(error).split())[:160]
        raise DataError(
            where,
            f"no folder {DEFAULT_FOLDER}/{task.name}, and the Hub's {task.hub.path} gave: {found}",
            "rows from somewhere",
            _THREE_WAYS,
        ) from error
    place = " ".join(filter(None, (task.hub.path, task.hub.config, split)))
    columns = columns_of(task, labelled)
    for column in columns:
        if column not in table.column_names:
            raise missing_column(place, column, table.column_names, columns)
    records = ((f"row {number}", record) for number, record in enumerate(table, start=1))
    return parse_rows(place, records, task, labelled)


@checked
def write_sample(folder: Location) -> list[Path]:
    """Write the generated corpus as ``folder/<task>/<split>.tsv``; returns the paths."""
    from mergekit_bert.data.task import get_task
    from mergekit_bert.files import write_atomic
    from mergekit_bert.outputs import Output, written

    splits = [(name, split) for name in sample.SAMPLE_TASKS for split in SPLITS]
    paths = [Path(folder) / name / f"{split}.tsv" for name, split in splits]
    with written(*map(Output, paths)) as parts:
        for part, (name, split) in zip(parts, splits, strict=True):
            task = get_task(name)
            rows = [[*texts, label] for texts, label in sample.generate(name, split)]
            write_atomic(part, tsv_text([[*task.text, task.label], *rows]).encode())
    return paths
