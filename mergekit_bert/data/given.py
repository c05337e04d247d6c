"""Rows as practitioners hold them: lists, a dict of columns, tables of pandas and datasets, Rows, the path of a file.

Neither pandas nor datasets is imported: a table is what has columns by name, or what gives its rows one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bert.arguments import reachable
from mergekit_bert.data.readers import Record, missing_column
from mergekit_bert.data.rows import Rows, columns_of, items, parse_rows, read_rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError

_FORMS = "a list of rows, a dict of columns, a table of pandas or datasets, Rows, or the path of a file"
_SPLITS = {"train": "train", "dev": "dev", "validation": "dev"}
"""The splits of a task by what a mapping of tables may call them."""


@dataclass(frozen=True, repr=False)
class Tables:
    """Rows that a caller holds, by the task's name and the split; ``where`` is the parameter that they came by."""

    where: str
    tables: Mapping[str, Mapping[str, Any]]

    def has(self, task: Task, split: str) -> bool:
        """Whether there are rows of ``task`` for ``split``."""
        return split in self.tables.get(task.name, {})

    def rows(self, task: Task, split: str, labelled: bool = True) -> Rows:
        """The rows of ``task`` for ``split``; raises :class:`DataError`, as :func:`rows_of` does."""
        if not self.has(task, split):
            found = ", ".join(f"{name}: {' and '.join(splits)}" for name, splits in self.tables.items())
            raise DataError(
                f"`{self.where}`",
                f"no {split} rows of {task.name!r} (found: {found or 'none'})",
                f'{{"{task.name}": {{"{split}": rows}}}}',
                "add them",
            )
        return rows_of(f"`{self.where}`, {task.name}", self.tables[task.name][split], task, labelled)

    def __str__(self) -> str:
        """What stands for them in a command line."""
        return "DIR"


Data = str | Path | Tables | None
"""Where rows come from: a folder, ``"sample"``, ``"synthetic"``, or tables; None: ``data/``, then the Hub."""


def given_data(where: str, data: Any, tasks: Sequence[Task], split: str) -> Data:
    """``data`` as a caller gives it to a function that works on ``tasks``.

    Beside the places of :data:`Data` these are tables by the task's name, or, of one task, its table alone. A table is
    for ``split``, or there is one for each: ``{"tone": {"train": …, "dev": …}}``. Raises :class:`DataError`.
    """
    if isinstance(data, str | Path):
        try:
            return reachable(data)
        except ValueError as error:
            raise DataError(f"`{where}`", f"{str(data)!r:.40}…", str(error), "correct it") from error
    if data is None or isinstance(data, Tables):
        return data
    names = [task.name for task in tasks]
    by_name = isinstance(data, Mapping) and set(data) <= set(names)
    if not by_name and len(tasks) > 1:
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise DataError(f"`{where}`", found, f"a folder, or tables by task: {', '.join(names)}", "give one of them")
    by_task = data if by_name else {names[0]: data}
    named = [task for task in tasks if task.name in by_task]
    return Tables(where, {task.name: _splits(by_task[task.name], task, split) for task in named})


def _splits(table: Any, task: Task, split: str) -> dict[str, Any]:
    """A table of ``task`` by its split; what can be read once only is kept as a list."""
    if isinstance(table, Mapping) and task.text[0] not in table and set(table) & set(_SPLITS):
        found = {_SPLITS[name]: one for name, one in table.items() if name in _SPLITS}
    else:
        found = {split: table}
    return {name: list(one) if isinstance(one, Iterator) else one for name, one in found.items()}


def rows_of(where: str, given: Any, task: Task, labelled: bool = True) -> Rows:
    """The rows of ``task`` in whatever form they come, labels as they stand in the data.

    A row is a dict, or a tuple: the texts, then the label (a text may stand alone where there is no more to a row).
    Labels are not read unless ``labelled``. Raises :class:`DataError` naming the row.
    """
    if isinstance(given, str | Path):
        return read_rows(Path(given), task, labelled)
    if isinstance(given, Rows):
        return _checked(given, task, labelled)
    columns = columns_of(task, labelled)
    return parse_rows(where, _records(where, given, columns, () if labelled else (task.label,)), task, labelled)


def texts_of(where: str, given: Any, task: Task) -> tuple[Rows, bool]:
    """Rows to predict, in any form that :func:`rows_of` takes, and whether it was a single one.

    A text is one row; so is, for a task of two texts, a tuple of two. A dict of columns or a list is rows.
    """
    single = isinstance(given, str) or (isinstance(given, tuple) and all(isinstance(text, str) for text in given))
    if isinstance(given, Rows | Path):
        return rows_of(where, given, task, labelled=False), False
    if not single and hasattr(given, "__len__") and len(given) == 0:
        return Rows((), None, where), False
    records = _records(where, [given] if single else given, task.text)
    return parse_rows(where, records, task, labelled=False), single


def _checked(rows: Rows, task: Task, labelled: bool) -> Rows:
    """``rows``, which must be of ``task``."""
    if any(len(texts) != len(task.text) for texts in rows.texts):
        wrong = next(len(texts) for texts in rows.texts if len(texts) != len(task.text))
        raise DataError(
            rows.where,
            f"wrong number of texts per row ({wrong})",
            f"{len(task.text)}: {' and '.join(task.text)}",
            "correct the rows",
        )
    if labelled and rows.labels is None:
        raise DataError(rows.where, "rows without labels", f"labels of {task.name!r}", "give labelled rows")
    return rows if labelled else Rows(rows.texts, None, rows.where)


def _records(where: str, given: Any, columns: Sequence[str], spare: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """(place, record) for each row; a row that is a tuple may have ``spare`` cells behind those of ``columns``."""
    if isinstance(given, Mapping) or (hasattr(given, "columns") and hasattr(given, "__getitem__")):
        return _by_column(where, given, columns)
    return _by_row(where, given, columns, spare)


def _by_column(where: str, table: Any, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    names = list(table if isinstance(table, Mapping) else table.columns)
    cells: dict[str, list[Any]] = {}
    for column in columns:
        if column not in names:
            raise missing_column(where, column, map(str, names), columns)
        cells[column] = items(f"{where}, column {column!r}", table[column], "a list of values")
    if len(set(map(len, cells.values()))) > 1:
        found = ", ".join(f"{len(values)} in {column!r}" for column, values in cells.items())
        raise DataError(where, f"columns of unequal length ({found})", "one value in each column a row", "correct them")
    for number, row in enumerate(zip(*cells.values(), strict=True), start=1):
        yield f"row {number}", dict(zip(columns, map(_plain, row), strict=True))


def _by_row(where: str, rows: Any, columns: Sequence[str], spare: Sequence[str]) -> Iterator[tuple[str, Record]]:
    for number, row in enumerate(items(where, rows, _FORMS), start=1):
        place = f"row {number}"
        if isinstance(row, Mapping):
            for column in columns:
                if column not in row:
                    raise missing_column(f"{where}, {place}", column, map(str, row), columns)
            yield place, {column: _plain(row[column]) for column in columns}
            continue
        expected = f"({', '.join(columns)}), or a dict of them"
        cells = [row] if isinstance(row, str) else items(f"{where}, {place}", row, expected)
        if not len(columns) <= len(cells) <= len(columns) + len(spare):
            raise DataError(f"{where}, {place}", f"{len(cells)} values", expected, "correct it")
        yield place, dict(zip(columns, map(_plain, cells), strict=False))


def _plain(cell: Any) -> Any:
    """A value of numpy as Python's own."""
    return cell.item() if isinstance(cell, np.generic) else cell
