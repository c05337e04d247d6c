"""Rows: texts and labels of a task, from records of any kind or from plain text, and checked one by one."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_bert.data.kind import Label, LabelError, kind_of
from mergekit_bert.data.metric import Columns
from mergekit_bert.data.readers import SUFFIXES, Record, missing_column, read_lines, read_records
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError
from mergekit_bert.hardware import generator

MAX_TEXT = 2 * 2**20
"""Characters of one text."""


@dataclass(frozen=True)
class Rows:
    """Texts (one or two a row) and labels, as :data:`~mergekit_bert.data.kind.Label` has them."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[Label, ...] | None
    where: str

    def __post_init__(self) -> None:
        """Refuse what is no text: a value that is not a string, or half of a surrogate pair."""
        for number, row in enumerate(self.texts, start=1):
            for text in row:
                try:
                    text.encode()
                except (AttributeError, UnicodeEncodeError) as error:
                    raise _no_text(f"{self.where}, row {number}", text) from error

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "Rows":
        """The rows at ``indices``, in that order."""
        chosen = list(indices)
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen)
        return Rows(tuple(self.texts[i] for i in chosen), labels, self.where)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of texts and labels."""
        digest = hashlib.sha256()
        for number, texts in enumerate(self.texts):
            label = None if self.labels is None else self.labels[number]
            digest.update(json.dumps([texts, label]).encode())
        return digest.hexdigest()

    def hashes(self) -> list[str]:
        """Of the texts of each row, the first 8 bytes of their SHA-256 (hex); labels do not count."""
        return [hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] for texts in self.texts]

    def record(self) -> dict[str, Any]:
        """What a file keeps of rows whose labels it has seen: by the hashes each of them is known again."""
        return {"fingerprint": self.fingerprint(), "count": len(self), "texts": sorted(set(self.hashes()))}

    def label_column(self, task: Task) -> Columns:
        """Labels as a metric compares them."""
        assert self.labels is not None
        return kind_of(task).truth(task, self.labels)


def hold_out(rows: Rows, share: float, limit: int, seed: int) -> tuple[Rows, Rows]:
    """Split off ``share`` of the rows (at most ``limit``) by a seeded shuffle: (the rest, the held-out)."""
    held = held_places(len(rows), share, limit, seed)
    if not 0 < len(held) < len(rows):
        raise DataError(
            rows.where, f"{len(rows)} rows", f"enough rows to hold out {share:.0%} of them", "give more rows"
        )
    return rows.take(sorted(set(range(len(rows))) - set(held))), rows.take(sorted(held))


def held_places(count: int, share: float, limit: int, seed: int) -> list[int]:
    """Which of ``count`` rows :func:`hold_out` holds out."""
    return shuffled(count, seed)[: min(round(count * share), limit)]


def shuffled(count: int, seed: int) -> list[int]:
    """The places of ``count`` rows in a seeded order."""
    return torch.randperm(count, generator=generator(seed, 11)).tolist()


def find_file(folder: Path, split: str) -> Path | None:
    """``folder/split`` with one of the known suffixes; two of them are an error."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(str(folder), f"{names}", f"one file for the split {split!r}", "remove all but one")
    return found[0] if found else None


def read_rows(path: Path, task: Task, labelled: bool = True) -> Rows:
    """The rows of a file, checked; raises :class:`DataError` naming the line. Without labels if not ``labelled``."""
    return parse_rows(str(path), read_records(path, columns_of(task, labelled)), task, labelled)


def columns_of(task: Task, labelled: bool) -> Sequence[str]:
    """The columns that rows of ``task`` must have."""
    return (*task.text, task.label) if labelled else task.text


def read_texts(path: Path, task: Task) -> Rows:
    """The rows of a plain text file: one a line as it stands, a tab between two texts; blank lines are skipped.

    There is neither a header nor quoting. Raises :class:`DataError` naming the line.
    """
    if path.suffix in SUFFIXES and path.suffix != ".tsv":
        raise DataError(
            str(path),
            f"a table, by its suffix {path.suffix!r}",
            "plain text, one row a line",
            f"put it in DIR/{task.name}/ as train{path.suffix} and give `data=DIR`",
        )
    texts = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        spot, cells = f"{path}, line {number}", line.rstrip("\r\n").split("\t")
        if len(cells) != len(task.text):
            raise DataError(
                spot,
                f"{len(cells)} texts (a tab stands between two)",
                f"{len(task.text)} for the task {task.name!r}: {', '.join(task.text)}",
                "correct the line (a table with a header belongs into `data=DIR`)",
            )
        texts.append(tuple(_text(spot, *one) for one in zip(task.text, cells, strict=True)))
    if not texts:
        raise DataError(str(path), "no rows", "at least one row", "check the file")
    return Rows(tuple(texts), None, str(path))


def parse_rows(where: str, records: Iterable[tuple[str, Record]], task: Task, labelled: bool) -> Rows:
    """Rows from (place, record) pairs, e.g. ``("line 7", {"sentence": …, "label": …})``."""
    texts: list[tuple[str, ...]] = []
    labels: list[Label] = []
    for place, record in records:
        spot = f"{where}, {place}"
        texts.append(tuple(_text(spot, column, record[column]) for column in task.text))
        if labelled:
            labels.append(parse_label(spot, task, record[task.label]))
    if not texts:
        raise DataError(where, "no rows", "at least one row", "check the file")
    return Rows(tuple(texts), tuple(labels) if labelled else None, where)


def _text(spot: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else repr(value)
        raise DataError(spot, f"{found} in column {column!r}", "text", "correct the line")
    if len(value) > MAX_TEXT:
        raise DataError(
            spot, f"{len(value):,} characters in column {column!r}", f"at most {MAX_TEXT:,}", "shorten the text"
        )
    return value


def parse_label(spot: str, task: Task, value: Any) -> Label:
    """A label as it stands in the data; raises :class:`DataError`."""
    try:
        return kind_of(task).parse(task, value)
    except LabelError as error:
        raise DataError(spot, f"label {value!r}", error.expected, "correct the line") from error


def parse_requests(
    where: str, records: Iterable[tuple[str, Record]], tasks: Mapping[str, Task]
) -> list[tuple[str, tuple[str, ...]]]:
    """(task, texts) from records that name their task in the column ``task``; raises :class:`DataError`."""
    found = []
    for place, record in records:
        spot = f"{where}, {place}"
        task = tasks.get(str(record["task"]))
        if task is None:
            raise DataError(spot, f"task {record['task']!r}", f"one of {', '.join(tasks)}", "correct the line")
        for column in task.text:
            if column not in record:
                raise missing_column(spot, column, record, ("task", *task.text))
        found.append((task.name, tuple(_text(spot, column, record[column]) for column in task.text)))
    return found


def given_rows(where: str, texts: object) -> Rows:
    """Rows as a caller gives them: an iterable of texts, or of iterables of texts; ``where`` is the parameter's name.

    Raises :class:`DataError` naming the row.
    """
    rows = []
    for number, given in enumerate(items(where, texts, "a list of texts, or of pairs of texts"), start=1):
        spot = f"{where}, row {number}"
        row = (given,) if isinstance(given, str) else tuple(items(spot, given, "a text, or a list of two"))
        for text in row:
            if not isinstance(text, str):
                raise _no_text(spot, text)
        rows.append(row)
    return Rows(tuple(rows), None, where)


def items(where: str, given: object, expected: str) -> list[Any]:
    """What an iterable gives; raises :class:`DataError` for all that is no list of things: a string, bytes, a dict."""
    try:
        if isinstance(given, str | bytes | bytearray | memoryview | Mapping | Set):
            raise TypeError
        source = iter(given)  # type: ignore[call-overload]
    except TypeError:
        raise DataError(where, f"{_shown(given)} ({type(given).__name__})", expected, "correct it") from None
    return list(source)


def _no_text(spot: str, value: object) -> DataError:
    return DataError(spot, f"no valid text ({_shown(value)})", "Unicode text", "correct it")


def _shown(value: object) -> str:
    """The beginning of ``value``, on one line."""
    return " ".join(repr(value).split())[:40]
