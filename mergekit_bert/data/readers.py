"""Tables from strangers: TSV, CSV, JSON lines and Parquet as records, each with its place; and lines of plain text.

What is read is bounded: the length of a line, their number, and what a Parquet file unpacks to. It knows nothing of
tasks: what the columns mean is for :mod:`mergekit_bert.data.rows`.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_bert.documents import DocumentError, parse_json
from mergekit_bert.errors import DataError, MissingExtraError

Record = dict[str, Any]
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
MAX_LINE = 8 * 2**20
"""Bytes of a line, and characters between the quotes of a row."""
_BLOCK = 2**20
MAX_ROWS = 5_000_000
MAX_PARQUET = 512 * 2**20
"""Bytes that the columns of a Parquet file unpack to, and characters of all its rows together."""
_SPARE, _PACKED = 64 * 2**20, 200
"""Characters that any Parquet file may have, and how many more for each byte of it: text is not packed tighter."""
_PARQUET_ROWS = 128
"""Rows unpacked at a time: what a file says of its size before that may be wrong."""


def read_records(path: Path, columns: Sequence[str], also: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """(place, record) for each row of a file that has ``columns``, e.g. ``("line 7", {"sentence": …, "label": …})``.

    Columns in ``also`` are read where they are there, others perhaps not. Raises :class:`DataError` naming the place.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(str(path), f"suffix {path.suffix!r}", f"one of {', '.join(SUFFIXES)}", "rename or convert it")
    if path.suffix == ".parquet":
        return _read_parquet(path, columns, also)
    if path.suffix == ".jsonl":
        return _read_jsonl(str(path), read_lines(path), columns)
    return _read_delimited(str(path), read_lines(path), columns, "," if path.suffix == ".csv" else "\t")


def read_table(where: str, read: Callable[[int], bytes], columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """(place, record) for each row of a TSV with a header; ``read(size)`` gives its next bytes, none at the end."""
    return _read_delimited(where, _lines(where, read), columns, "\t")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) for each line of a regular file in UTF-8; raises :class:`DataError`."""
    _check_regular(path)
    try:
        with path.open("rb") as file:
            yield from _lines(str(path), file.read)
    except OSError as error:
        raise _unreadable(path, error) from error


def missing_column(where: str, column: str, found: Iterable[str], columns: Sequence[str]) -> DataError:
    """The error for a file that lacks ``column``."""
    return DataError(
        where,
        f"no column {column!r} (found: {', '.join(found) or 'none'})",
        f"columns {', '.join(columns)}",
        "rename the column, or name it in a task's YAML",
    )


def tsv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows of cells as TSV that reads back, whatever is in the cells."""
    text = io.StringIO()
    plain = csv.writer(text, delimiter="\t", lineterminator="\n")
    quoted = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:  # the csv module leaves a lone carriage return unquoted
        (quoted if any("\r" in str(cell) for cell in row) else plain).writerow(row)
    return text.getvalue()


def _check_regular(path: Path) -> None:
    """Raise DataError for what is not there, and for a folder or a device, which could be read for ever."""
    try:
        found = "" if path.is_file() else "a folder" if path.is_dir() else "no regular file" if path.exists() else None
    except OSError as error:
        raise _unreadable(path, error) from error
    if found is None:
        raise DataError(str(path), "no such file", "a data file", "check the path")
    if found:
        raise DataError(str(path), found, "a data file", "check the path")


def _unreadable(path: Path, error: OSError) -> DataError:
    found = (error.strerror or str(error)).lower()
    return DataError(str(path), found, "a file that can be read", "check the path and its permissions")


def _lines(where: str, read: Callable[[int], bytes]) -> Iterator[tuple[int, str]]:
    """Lines end with a line feed, a carriage return, or both, which stay; a mark at the start is dropped."""
    number, rest = 0, b""
    while block := read(_BLOCK):
        data = rest + block
        # A carriage return at the end may be half of a line end.
        end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
        rest = data[end:]
        if len(rest) > MAX_LINE:
            raise _too_long(where, number + len(data[:end].splitlines()) + 1)
        for line in _decoded(where, data[:end], number):
            number += 1
            yield number, line
        if number > MAX_ROWS:
            raise _too_much(where, f"more than {MAX_ROWS:,} lines")
    yield from enumerate(_decoded(where, rest, number), start=number + 1)


def _decoded(where: str, data: bytes, before: int) -> Iterator[str]:
    """The lines of ``data``, before which came so many."""
    for number, line in enumerate(data.splitlines(keepends=True), start=before + 1):
        if len(line) > MAX_LINE:
            raise _too_long(where, number)
        try:
            yield (line if number > 1 else line.removeprefix(codecs.BOM_UTF8)).decode()
        except UnicodeDecodeError as error:
            spot, found = f"{where}, line {number}", f"a byte that is not UTF-8 ({error.reason})"
            raise DataError(spot, found, "UTF-8 text", "save the file as UTF-8") from error


def _too_long(where: str, number: int) -> DataError:
    found = f"more than {MAX_LINE:,} bytes"
    return DataError(f"{where}, line {number}", found, "a shorter line", "break it up, or drop it")


def _read_delimited(
    where: str, lines: Iterator[tuple[int, str]], columns: Sequence[str], delimiter: str
) -> Iterator[tuple[str, Record]]:
    """(place, record) for each row of delimited text with a header, quoted the way spreadsheets do it."""
    rows = _cells(where, lines, delimiter)
    number, header = next(rows, (0, None))
    if header is None:
        raise DataError(where, "it is empty", "a header line and rows", "check the file")
    for column in columns:
        if column not in header:
            raise missing_column(where, column, header, columns)
        if header.count(column) > 1:
            raise DataError(where, f"{header.count(column)} columns {column!r}", "one of each", "rename the others")
    for number, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{where}, line {number}",
                f"{len(cells)} cells",
                f"{len(header)} cells",
                "correct the line (an open quote swallows the lines after it)",
            )
        yield f"line {number}", dict(zip(header, cells, strict=True))


def _cells(where: str, lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the last line, cells) of each row that is not blank.

    A cell that begins with a quote ends with one; between them a quote is written twice, and lines may end (RFC 4180).
    The csv module does the same, but bounds a cell by a number that the whole process shares.
    """
    cells: list[str] = []
    parts: list[str] | None = None  # of the cell whose quote is open
    first, size = 0, 0  # line and characters of the row that is not finished
    for number, line in lines:
        if '"' not in line and not size:
            if text := line.rstrip("\r\n"):
                yield number, text.split(delimiter)
            continue
        first, size = first if size else number, size + len(line)
        if size > MAX_LINE:
            raise _bad_quotes(where, first, f"more than {MAX_LINE:,} characters in quotes")
        text, place = line.rstrip("\r\n"), 0
        while place <= len(text):
            if parts is None and not text.startswith('"', place):
                end = text.find(delimiter, place)
                end = len(text) if end < 0 else end
                cells.append(text[place:end])
                place = end + 1
                continue
            if parts is None:
                parts, place = [], place + 1
            end = _closing_quote(line, place)
            if end < 0:
                parts.append(line[place:])
                break
            cells.append("".join([*parts, line[place:end]]).replace('""', '"'))
            parts, place = None, end + 1
            if text[place : place + 1] not in ("", delimiter):
                raise _bad_quotes(where, first, "text after a closing quote")
            place += 1
        else:
            yield number, cells
            cells, size = [], 0
    if parts is not None:
        raise _bad_quotes(where, first, "a quote that is never closed")


def _closing_quote(line: str, place: int) -> int:
    """Where the quote is that closes a cell, from ``place`` on; -1 where it is not in this line."""
    while (end := line.find('"', place)) >= 0 and line.startswith('"', end + 1):
        place = end + 2
    return end


def _bad_quotes(where: str, number: int, found: str) -> DataError:
    return DataError(f"{where}, line {number}", f"a bad line ({found})", "well-quoted text", "correct the line")


def _read_jsonl(where: str, lines: Iterator[tuple[int, str]], columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except DocumentError as error:
            spot = f"{where}, line {number}"
            raise DataError(spot, str(error), "one JSON object a line", "correct the line") from error
        if not isinstance(record, dict):
            found = f"a {type(record).__name__}"
            raise DataError(f"{where}, line {number}", found, "a JSON object", "correct the line")
        for column in columns:
            if column not in record:
                raise missing_column(f"{where}, line {number}", column, record, columns)
        yield f"line {number}", record


def _read_parquet(path: Path, columns: Sequence[str], also: Sequence[str]) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError(
            str(path), "the package pyarrow is not installed", "pyarrow for Parquet files", "install mbert[parquet]"
        ) from error
    _check_regular(path)
    number = characters = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = _wanted(str(path), file, columns, also)
        # Texts stay in the dictionary of the file: a long one that comes a million times is read once.
        with parquet.ParquetFile(path, read_dictionary=wanted, page_checksum_verification=True) as file:
            most = min(MAX_PARQUET, _SPARE + _PACKED * path.stat().st_size)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                values = [_values(path, number, batch[name]) for name in wanted]
                characters += sum(len(one) for column in values for one in set(column) if isinstance(one, str))
                if characters > most:
                    raise _too_much(path, f"more than {most:,} characters")
                for number, cells in enumerate(zip(*values, strict=True), start=number + 1):  # noqa: B020
                    yield f"row {number}", dict(zip(wanted, cells, strict=True))
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
        raise DataError(str(path), f"not readable as Parquet ({error})", "a Parquet file", "write it again") from error


def _wanted(where: str, file: Any, columns: Sequence[str], also: Sequence[str]) -> list[str]:
    """The columns of a Parquet file that are to be read, once they are known to be plain and not too large."""
    schema, metadata = file.schema_arrow, file.metadata
    for column in columns:
        if column not in schema.names:
            raise missing_column(where, column, schema.names, columns)
    wanted = list(dict.fromkeys([*columns, *(column for column in also if column in schema.names)]))
    for column in wanted:
        if schema.names.count(column) > 1:
            raise DataError(
                where, f"{schema.names.count(column)} columns {column!r}", "one of each", "rename the others"
            )
        kind = schema.field(column).type
        if not _is_plain(kind):
            raise DataError(where, f"column {column!r} of type {kind}", "texts or numbers", "convert the column")
    places = [place for place in range(len(file.schema)) if file.schema.column(place).path in wanted]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    size = sum(group.column(place).total_uncompressed_size for group in groups for place in places)
    if metadata.num_rows > MAX_ROWS:
        raise _too_much(where, f"more than {MAX_ROWS:,} rows")
    if size > MAX_PARQUET:
        raise _too_much(where, f"{size:,} bytes once unpacked")
    return wanted


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_decimal)
    return any(check(kind) for check in (*checks, types.is_boolean, types.is_null))


def _values(path: Path, before: int, column: Any) -> list[Any]:
    """The values of a column's next rows, of which ``before`` came already."""
    try:
        if not hasattr(column, "dictionary"):
            return list(column.to_pylist())
        words = {
            place: column.dictionary[place].as_py()
            for place in column.indices.unique().to_pylist()
            if place is not None
        }
        return [None if place is None else words[place] for place in column.indices.to_pylist()]
    except UnicodeDecodeError as error:
        spot = f"{path}, row {before + _first_bad(column) + 1}"
        raise DataError(spot, f"a text that is not UTF-8 ({error.reason})", "UTF-8", "write it again") from error


def _first_bad(array: Any) -> int:
    for place, value in enumerate(array):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return place
    return 0


def _too_much(where: Path | str, found: str) -> DataError:
    return DataError(str(where), found, "a smaller table", "give a part of it")
