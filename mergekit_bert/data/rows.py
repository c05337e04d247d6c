"""Rows: texts and labels, read from TSV, CSV, JSON lines, Parquet or plain text, and checked line by line."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_bert.data.kind import Label, LabelError, kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError, MissingExtraError
from mergekit_bert.hardware import generator

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


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
                    raise DataError(
                        f"{self.where}, row {number}", f"no valid text ({text!r:.40})", "Unicode text", "correct it"
                    ) from error

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

    def label_column(self) -> np.ndarray:
        """Labels as float64: an index, a value, or a column of marks for each label."""
        assert self.labels is not None
        return np.asarray(self.labels, dtype=np.float64)


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


def columns_of(task: Task, labelled: bool) -> tuple[str, ...]:
    """The columns that rows of ``task`` must have."""
    return (*task.text, task.label) if labelled else task.text


def read_texts(path: Path, task: Task) -> Rows:
    """The rows of a plain text file: one a line as it stands, a tab between two texts; blank lines are skipped.

    There is neither a header nor quoting. Raises :class:`DataError` naming the line.
    """
    if path.suffix in (".csv", ".jsonl", ".parquet"):
        raise DataError(
            str(path),
            f"a table, by its suffix {path.suffix!r}",
            "plain text, one row a line",
            f"put it in DIR/{task.name}/ as train{path.suffix} and give --data DIR",
        )
    count = len(task.text)
    texts = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = tuple(line.rstrip("\r\n").split("\t"))
        if len(row) != count:
            raise DataError(
                f"{path}, line {number}",
                f"{len(row)} texts (a tab stands between two)",
                f"{count} for the task {task.name!r}: {', '.join(task.text)}",
                "correct the line (a table with a header belongs into --data DIR)",
            )
        texts.append(row)
    if not texts:
        raise DataError(str(path), "no rows", "at least one row", "check the file")
    return Rows(tuple(texts), None, str(path))


def parse_rows(where: str, records: Iterable[tuple[str, dict[str, Any]]], task: Task, labelled: bool) -> Rows:
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
    return value


def parse_label(spot: str, task: Task, value: Any) -> Label:
    """A label as it stands in the data; raises :class:`DataError`."""
    try:
        return kind_of(task).parse(task, value)
    except LabelError as error:
        raise DataError(spot, f"label {value!r}", error.expected, "correct the line") from error


def read_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) for each row of a file that has ``columns``; raises :class:`DataError`."""
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(str(path), f"suffix {path.suffix!r}", f"one of {', '.join(readers)}", "rename or convert it")
    if not path.is_file():
        raise DataError(str(path), "no such file", "a data file", "check the path")
    return readers[path.suffix](path, columns)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        data = path.read_bytes()
        number = data.count(b"\n", 0, _first_undecodable(data)) + 1
        raise DataError(
            f"{path}, line {number}",
            f"a byte that is not UTF-8 ({error.reason})",
            "UTF-8 text",
            "save the file as UTF-8",
        ) from error
    except OSError as error:
        found = (error.strerror or str(error)).lower()
        raise DataError(str(path), found, "a file that can be read", "check the path and its permissions") from error


def _first_undecodable(data: bytes) -> int:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def missing_column(where: str, column: str, found: Iterable[str], columns: Sequence[str]) -> DataError:
    """The error for a file that lacks ``column``."""
    return DataError(
        where,
        f"no column {column!r} (found: {', '.join(found) or 'none'})",
        f"columns {', '.join(columns)}",
        "rename the column, or name it in a task's YAML",
    )


def read_delimited(
    where: str, lines: Iterable[str], columns: Sequence[str], delimiter: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) for each row of delimited text with a header, quoted the way the csv module quotes."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames
        if header is None:
            raise DataError(where, "it is empty", "a header line and rows", "check the file")
        for column in columns:
            if column not in header:
                raise missing_column(where, column, header, columns)
            if header.count(column) > 1:
                raise DataError(where, f"{header.count(column)} columns {column!r}", "one of each", "rename the others")
        for record in reader:
            if None in record or None in record.values():
                count = len(header) + len(record.get(None) or []) - sum(v is None for v in record.values())
                raise DataError(
                    f"{where}, line {reader.line_num}",
                    f"{count} cells",
                    f"{len(header)} cells",
                    "correct the line (an open quote swallows the lines after it)",
                )
            yield f"line {reader.line_num}", record
    except csv.Error as error:  # the row that it could not finish starts after the last good one
        raise DataError(
            f"{where}, line {reader.line_num + 1}", f"a bad line ({error})", "well-quoted text", "correct the line"
        ) from error


def read_table(where: str, data: bytes, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) for each row of a TSV with a header, from its bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(where, f"a byte that is not UTF-8 ({error.reason})", "UTF-8 text", "convert it") from error
    return read_delimited(where, io.StringIO(text, newline=""), columns, "\t")


def parse_requests(
    where: str, records: Iterable[tuple[str, dict[str, Any]]], tasks: Mapping[str, Task]
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


def tsv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells as TSV that reads back, whatever is in the cells."""
    text = io.StringIO()
    plain = csv.writer(text, delimiter="\t", lineterminator="\n")
    quoted = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:  # the csv module leaves a lone carriage return unquoted
        (quoted if any("\r" in str(cell) for cell in row) else plain).writerow(row)
    return text.getvalue()


def _read_tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_delimited(str(path), _lines(path), columns, "\t")


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_delimited(str(path), _lines(path), columns, ",")


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        spot = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(spot, f"not JSON ({error})", "one JSON object a line", "correct the line") from error
        if not isinstance(record, dict):
            raise DataError(spot, f"a {type(record).__name__}", "a JSON object", "correct the line")
        for column in columns:
            if column not in record:
                raise missing_column(spot, column, record, columns)
        yield f"line {number}", record


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError(
            str(path), "the package pyarrow is not installed", "pyarrow for Parquet files", "install mbert[parquet]"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise missing_column(str(path), column, names, columns)
            records = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"not readable as Parquet ({error})", "a Parquet file", "write it again") from error
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record
