"""Tables: four formats give the same rows, and every bad or hostile file its own one-line error that says where."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_bert.data import readers
from mergekit_bert.data.readers import read_records, read_table
from mergekit_bert.data.rows import parse_rows, read_rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError, MissingExtraError

Records = list[dict[str, Any]]

PAIR = Task(name="pair", kind="classify", text=("one", "two"), metrics=("accuracy",), labels=("no", "yes", "ja\tnein"))
VALUE = Task(name="value", kind="regress", text=("text",), metrics=("pearson",), label="score", range=(-1.0, 2.5))

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    [
        '"',
        '""',
        "a\tb",
        "a\nb",
        "a\r\nb",
        "a\rb",
        ",",
        "'",
        " ",
        "",
        "\u2028",
        "\ufeff",
        "émoji 🎉",
        "\\n",
        "NA",
        "null",
    ]
)


def write_delimited(path: Path, records: Records, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(records)


def write_jsonl(path: Path, records: Records, ascii_only: bool = False) -> None:
    text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    path.write_bytes(text.encode())


def write_parquet(path: Path, records: Records) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


WRITERS: dict[str, Callable[[Path, Records], None]] = {
    "minimal.tsv": lambda path, records: write_delimited(path, records, "\t"),
    "all.tsv": lambda path, records: write_delimited(path, records, "\t", csv.QUOTE_ALL),
    "minimal.csv": lambda path, records: write_delimited(path, records, ","),
    "plain.jsonl": write_jsonl,
    "ascii.jsonl": lambda path, records: write_jsonl(path, records, ascii_only=True),
    "rows.parquet": write_parquet,
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(PAIR.labels)), min_size=1, max_size=6))
def test_every_format_gives_the_same_rows(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    records = [{"one": one, "label": label, "unused": "x", "two": two} for one, two, label in rows]
    for name, write in WRITERS.items():
        write(tmp_path / name, records)
        found = read_rows(tmp_path / name, PAIR)
        assert found.texts == tuple((one, two) for one, two, _ in rows), name
        assert found.labels == tuple(PAIR.labels.index(label) for _, _, label in rows), name


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.floats(-1, 2.5), min_size=1, max_size=6))
def test_every_format_gives_the_same_values_to_the_last_bit(tmp_path: Path, values: list[float]) -> None:
    records = [{"text": "a", "score": value} for value in values]
    fingerprints = set()
    for name, write in WRITERS.items():
        write(tmp_path / name, records)
        found = read_rows(tmp_path / name, VALUE)
        assert found.labels == tuple(values), name
        fingerprints.add(found.fingerprint())
    assert len(fingerprints) == 1


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    plain, marked = tmp_path / f"plain.{suffix}", tmp_path / f"marked.{suffix}"
    WRITERS[{"tsv": "minimal.tsv", "csv": "minimal.csv", "jsonl": "plain.jsonl"}[suffix]](
        plain, [{"text": "a", "score": 1.5}]
    )
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_rows(marked, VALUE).texts == read_rows(plain, VALUE).texts == (("a",),)


def test_lines_may_end_the_windows_way_and_the_last_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"text\tscore\r\na b\t1\r\nc\t2")
    assert read_rows(path, VALUE).texts == (("a b",), ("c",))


SPOT = r"{path}, line 3: "
BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("tsv", b"", r"{path}: it is empty; expected a header line and rows; "),
    "only a mark": ("tsv", b"\xef\xbb\xbf", r"{path}: it is empty; "),
    "empty lines": ("jsonl", b"\n\n", r"{path}: no rows; expected at least one row; "),
    "header only": ("csv", b"text,score\n", r"{path}: no rows; expected at least one row; "),
    "missing column": (
        "tsv",
        b"sentence\tscore\na\t1\n",
        r"{path}: no column 'text' \(found: sentence, score\); expected columns text, score; ",
    ),
    "missing label": ("tsv", b"text\na\n", r"{path}: no column 'score' \(found: text\); "),
    "missing key": ("jsonl", b'{"text": "a", "score": 1}\n\n{"text": "b"}\n', SPOT + r"no column 'score' \(found: te"),
    "twice": ("tsv", b"text\ttext\tscore\na\tb\t1\n", r"{path}: 2 columns 'text'; expected one of each; "),
    "too few cells": ("tsv", b"text\tscore\na\t1\nb\n", SPOT + r"1 cells; expected 2 cells; "),
    "too many cells": ("tsv", b"text\tscore\na\t1\nb\t1\tx\ty\n", SPOT + r"4 cells; expected 2 cells; "),
    "open quote": (
        "csv",
        b'text,score\na,1\n"b,1\nc,2\n',
        SPOT + r"a bad line \(a quote that is never closed\); expected well-quoted",
    ),
    "text after a quote": (
        "csv",
        b'text,score\na,1\n"b"c,1\n',
        SPOT + r"a bad line \(text after a closing quote\); expected well-quoted",
    ),
    "too high": ("tsv", b"text\tscore\na\t1\nb\t3\n", SPOT + r"label '3'; expected a number from -1 to 2.5; "),
    "too low": ("jsonl", b'{"text":"a","score":0}\n\n{"text":"a","score":-1.1}', SPOT + r"label -1.1; expected a nu"),
    "nan": ("tsv", b"text\tscore\na\t1\nb\tnan\n", SPOT + r"label 'nan'; expected a number from"),
    "json nan": ("jsonl", b'\n\n{"text":"a","score":NaN}', SPOT + r"NaN, which is no number; expected one JSON"),
    "infinite": ("tsv", b"text\tscore\na\t1\nb\tinf\n", SPOT + r"label 'inf'; "),
    "no number": ("tsv", b"text\tscore\na\t1\nb\tbad\n", SPOT + r"label 'bad'; expected a number"),
    "no label": ("tsv", b"text\tscore\na\t1\nb\t\n", SPOT + r"label ''; expected a number"),
    "null": ("jsonl", b'\n\n{"text":"a","score":null}', SPOT + r"label None; expected a number"),
    "true": ("jsonl", b'\n\n{"text":"a","score":true}', SPOT + r"label True; expected a number"),
    "huge": (
        "jsonl",
        b'\n\n{"text":"a","score":1' + b"0" * 400 + b"}",
        SPOT + r"a number of 401 digits; expected one JSON",
    ),
    "huge digits": ("jsonl", b'\n\n{"text":"a","score":' + b"9" * 5000 + b"}", SPOT + r"a number of 5,000 digits; "),
    "too large": ("jsonl", b'\n\n{"text":"a","score":1e999}', SPOT + r"the number 1e999, which is not finite; "),
    "key twice": ("jsonl", b'\n\n{"text":"a","text":"b","score":1}', SPOT + r"the key 'text' twice; expected one JSON"),
    "half of a pair": ("jsonl", b'\n\n{"text":"\\ud800","score":1}', SPOT + r"half of a surrogate pair in a text; "),
    "a raw half": ("jsonl", b'\n\n{"text":"\xed\xa0\x80","score":1}', SPOT + r"a byte that is not UTF-8"),
    "too deep": ("jsonl", b"\n\n" + b"[" * 100_000, SPOT + r"nested too deeply; expected one JSON object a line; "),
    "deep label": ("jsonl", b'\n\n{"text":"a","score":' + b"[" * 99 + b"]" * 99 + b"}", SPOT + r"nested more than 64"),
    "long label": (
        "jsonl",
        b'\n\n{"text":"a","score":"' + b"x" * 10**6 + b'"}',
        SPOT + r"label 'x+…; expected",
    ),
    "steering": ("tsv", b"text\tscore\na\t1\nb\t\x1b[2J\n", SPOT + r"label '\\x1b\[2J'; expected a number"),
    "NUL": ("tsv", b"text\tscore\na\t1\nb\t\x00\n", SPOT + r"label '\\x00'; expected a number"),
    "no text": ("jsonl", b'\n\n{"text":null,"score":1}', SPOT + r"nothing in column 'text'; expected text; "),
    "number as text": ("jsonl", b'\n\n{"text":7,"score":1}', SPOT + r"7 in column 'text'; expected text; "),
    "latin-1": (
        "tsv",
        "text\tscore\na\t1\né\t1\n".encode("latin-1"),
        r"{path}, line 3: a byte that is not UTF-8",
    ),
    "UTF-16": ("tsv", "text\tscore\na\t1\n".encode("utf-16"), r"{path}, line 1: a byte that is not UTF-8 \("),
    "UTF-16 without mark": ("csv", "text,score\na,1\n".encode("utf-16-le"), r"{path}: no column 'text' \(found: t"),
    "broken JSON": (
        "jsonl",
        b'{"text":"a","score":1}\n\n{"text": ',
        SPOT + r"not JSON \(.*\); expected one JSON object ",
    ),
    "JSON list": ("jsonl", b'\n\n["a", 1]', SPOT + r"a list; expected a JSON object; "),
    "no parquet": ("parquet", b"PAR1 not really", r"{path}: not readable as Parquet \("),
    "empty parquet": ("parquet", b"", r"{path}: not readable as Parquet \("),
    "other suffix": ("txt", b"text\n", r"{path}: suffix '.txt'; expected one of .tsv, .csv, .jsonl, .parquet; "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_that_says_where_and_what(tmp_path: Path, case: str) -> None:
    suffix, content, message = BAD[case]
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path, VALUE)
    assert re.match(message.format(path=re.escape(str(path))), str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_long_file_in_another_encoding_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"text\tscore\n" + b"good\t1\n" * 20_000 + b"caf\xe9\t1\n")
    with pytest.raises(DataError, match=r"rows.tsv, line 20002: a byte that is not UTF-8"):
        read_rows(path, VALUE)


def test_a_line_number_counts_the_lines_inside_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,score\n"a\nb\nc",1\nd,9\n')
    with pytest.raises(DataError, match=re.escape(f"{path}, line 5: label '9'")):
        read_rows(path, VALUE)


def test_a_bad_row_of_a_parquet_file_is_told_by_its_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", [{"text": "a", "score": 1.0}, {"text": "b", "score": 7.0}])
    with pytest.raises(DataError, match=r"rows.parquet, row 2: label 7.0; expected a number from -1 to 2.5"):
        read_rows(tmp_path / "rows.parquet", VALUE)
    with pytest.raises(DataError, match=r"no column 'one' \(found: text, score\)"):
        read_rows(tmp_path / "rows.parquet", PAIR)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.tsv: no such file; expected a data file; check the path"):
        read_rows(tmp_path / "none.tsv", VALUE)
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match=r"folder.tsv: a folder; expected a data file"):
        read_rows(tmp_path / "folder.tsv", VALUE)


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "rows.parquet", [{"text": "a", "score": 1.0}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"install mbert\[parquet\]"):
        read_rows(tmp_path / "rows.parquet", VALUE)


def test_a_stream_is_read_like_a_file() -> None:
    content = '\ufeffone\ttwo\n"a ""b"""\t"c\nd"\n'.encode()
    records = read_table("standard input", io.BytesIO(content).read, PAIR.text)
    assert parse_rows("standard input", records, PAIR, labelled=False).texts == (('a "b"', "c\nd"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input: it is empty"),
        (b"one\ttwo\n", "standard input: no rows"),
        (b"one\na\n", r"standard input: no column 'two' \(found: one\)"),
        (b"one\ttwo\n\xff\tb\n", "standard input, line 2: a byte that is not UTF-8"),
        (b"one\ttwo\na\n", "standard input, line 2: 1 cells; expected 2 cells"),
    ],
)
def test_a_bad_stream_is_told(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_rows(
            "standard input", read_table("standard input", io.BytesIO(content).read, PAIR.text), PAIR, labelled=False
        )


def test_only_the_columns_asked_for_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tscore\na\t1\n")
    assert list(read_records(path, ["text"])) == [("line 2", {"text": "a", "score": "1"})]


@settings(max_examples=200, deadline=None)
@given(st.text('ab\t"\r\n\u2028', max_size=40))
def test_quotes_are_read_as_the_csv_module_reads_them(text: str) -> None:
    def cells(rows: Iterator[list[str]]) -> list[list[str]] | None:
        try:
            return [row for row in rows if row]
        except (csv.Error, DataError):
            return None

    read = io.BytesIO(f"x\n{text}".encode()).read
    ours = cells(row for _, row in readers._cells("here", readers._lines("here", read), "\t"))
    assert ours == cells(csv.reader(io.StringIO(f"x\n{text}", newline=""), delimiter="\t", strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_lines_are_the_same_wherever_a_block_ends(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(readers, "_BLOCK", size)
    content = "\ufeffone\r\n\r\rtwo é🎉\n\nthree\u2028\x85\x0b\r\n\rend"
    expected = list(io.StringIO(content.removeprefix("\ufeff"), newline=""))
    found = list(readers._lines("here", io.BytesIO(content.encode()).read))
    assert found == list(enumerate(expected, start=1))


def endless(start: bytes, then: bytes) -> Callable[[int], bytes]:
    """A stream that goes on for ever, of which a reader with bounds reads no more than thirty blocks."""
    blocks = iter([start or then, *[then * (1000 // len(then))] * 30])
    return lambda size: next(blocks)


@pytest.mark.parametrize(
    ("start", "then", "message"),
    [
        (b"", b"a", r"here, line 1: more than 9,000 bytes; expected a shorter line"),
        (b"one\ttwo\n", b"\0", r"here, line 2: more than 9,000 bytes; expected a shorter line"),
        (b'one\ttwo\n"', b"a\n", r"here, line 2: a bad line \(more than 9,000 characters in quotes\)"),
        (b'one\ttwo\n"', b'""', r"here, line 2: more than 9,000 bytes; "),
        (b"one\ttwo\n", b'"a\n"\t', r"here, line 2: a bad line \(more than 9,000 characters in quotes\)"),
    ],
)
def test_what_never_ends_is_read_no_further_than_a_line_may_be_long(
    monkeypatch: pytest.MonkeyPatch, start: bytes, then: bytes, message: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 9000)
    monkeypatch.setattr(readers, "_BLOCK", 1000)
    with pytest.raises(DataError, match=message):
        list(read_table("here", endless(start, then), PAIR.text))


def test_more_rows_than_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROWS", 50)
    for name, write in WRITERS.items():
        write(tmp_path / name, [{"text": "a", "score": 1.0}] * 49)
        assert len(read_rows(tmp_path / name, VALUE)) == 49
        write(tmp_path / name, [{"text": "a", "score": 1.0}] * 51)
        with pytest.raises(DataError, match=r"more than 50 (rows|lines); expected a smaller table; give a part of it"):
            read_rows(tmp_path / name, VALUE)


def test_a_long_cell_is_read_whole_and_the_csv_module_stays_as_it_is(tmp_path: Path) -> None:
    before, text = csv.field_size_limit(), 'a "b"\n' * 50_000
    for name, write in WRITERS.items():
        write(tmp_path / name, [{"text": text, "score": 1.0}])
        assert read_rows(tmp_path / name, VALUE).texts == ((text,),)
    assert csv.field_size_limit() == before < len(text)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_a_device_and_a_pipe_are_not_read(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(DataError, match=rf"{name}.{suffix}: no regular file; expected a data file"):
            read_rows(tmp_path / f"{name}.{suffix}", VALUE)
