"""Rows: four formats give the same rows, and every bad file its own one-line error that says where."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_bert.data.rows import (
    Rows,
    find_file,
    hold_out,
    parse_label,
    parse_rows,
    read_records,
    read_rows,
    read_table,
    read_texts,
)
from mergekit_bert.data.task import Task, get_task
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


def test_labels_are_not_needed_for_prediction(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\na\nb\n")
    assert read_rows(path, VALUE, labelled=False) == Rows((("a",), ("b",)), None, str(path))


LINE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\t\r\n"), max_size=20) | st.sampled_from(
    ['"', '"a', "'", ",", "", "\u2028b", "\x85b", "\ufeffb", " a "]
)


@pytest.mark.parametrize("task", [PAIR, VALUE], ids=lambda task: task.name)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]))
def test_plain_text_gives_the_rows_of_a_table(tmp_path: Path, task: Task, data: st.DataObject, end: str) -> None:
    row = st.tuples(*[LINE] * len(task.text)).filter(lambda row: "".join(row).strip() != "")
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    write_delimited(tmp_path / "rows.tsv", [dict(zip(task.text, row, strict=True)) for row in rows], "\t")
    table = read_rows(tmp_path / "rows.tsv", task, labelled=False)
    text = end.join("\t".join(row) for row in rows)
    for name, content in (("marked", f"\ufeff{text}"), ("plain", text), ("ended", text + end)):
        if name == "marked" or not text.startswith("\ufeff"):  # a first character that is a mark is no text
            (tmp_path / name).write_bytes(content.encode())
            found = read_texts(tmp_path / name, task)
            assert (found.texts, found.labels, found.fingerprint()) == (table.texts, None, table.fingerprint()), name


PLAIN: dict[str, tuple[str, bytes, Task, str]] = {
    "a tab too many": (
        "a.txt",
        b"a\n\nb\tc\n",
        VALUE,
        r"{path}, line 3: 2 texts \(.*\); expected 1 for .*'value': text; ",
    ),
    "a tab too few": ("a.tsv", b"a\tb\n\n\nc\n", PAIR, r"{path}, line 4: 1 texts \(.*\); expected 2 .*: one, two; "),
    "a table of pairs": ("a.tsv", b"one\ttwo\tlabel\n", PAIR, r"{path}, line 1: 3 texts .*header belongs into --data"),
    "nothing": ("a.txt", b"", VALUE, r"{path}: no rows; expected at least one row"),
    "blank lines": ("a.txt", b"\n \n\t\n", PAIR, r"{path}: no rows; expected at least one row"),
    "latin-1": ("a.txt", b"a\nb\n\xe9\n", VALUE, r"{path}, line 3: a byte that is not UTF-8"),
    "a table by its name": (
        "a.jsonl",
        b"{}",
        VALUE,
        r"{path}: a table, .*'.jsonl'; .*DIR/value/ as train.jsonl and give",
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_bad_plain_text_is_one_line_that_says_where_and_what(tmp_path: Path, case: str) -> None:
    name, content, task, message = PLAIN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_texts(tmp_path / name, task)
    assert re.match(message.format(path=re.escape(str(tmp_path / name))), str(caught.value))
    assert "\n" not in str(caught.value)


def test_plain_text_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: no such file or directory; "):
        read_texts(tmp_path / "none.txt", VALUE)


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
        SPOT + r"a bad line \(unexpected end of data\); expected well-quoted",
    ),
    "text after a quote": ("csv", b'text,score\na,1\n"b"c,1\n', SPOT + r"a bad line \(.*\); expected well-quoted"),
    "too high": ("tsv", b"text\tscore\na\t1\nb\t3\n", SPOT + r"label '3'; expected a number from -1 to 2.5; "),
    "too low": ("jsonl", b'{"text":"a","score":0}\n\n{"text":"a","score":-1.1}', SPOT + r"label -1.1; expected a nu"),
    "nan": ("tsv", b"text\tscore\na\t1\nb\tnan\n", SPOT + r"label 'nan'; expected a number from"),
    "json nan": ("jsonl", b'\n\n{"text":"a","score":NaN}', SPOT + r"label nan; expected a number from"),
    "infinite": ("tsv", b"text\tscore\na\t1\nb\tinf\n", SPOT + r"label 'inf'; "),
    "no number": ("tsv", b"text\tscore\na\t1\nb\tbad\n", SPOT + r"label 'bad'; expected a number"),
    "no label": ("tsv", b"text\tscore\na\t1\nb\t\n", SPOT + r"label ''; expected a number"),
    "null": ("jsonl", b'\n\n{"text":"a","score":null}', SPOT + r"label None; expected a number"),
    "true": ("jsonl", b'\n\n{"text":"a","score":true}', SPOT + r"label True; expected a number"),
    "huge": ("jsonl", b'\n\n{"text":"a","score":1' + b"0" * 400 + b"}", SPOT + r"label 10+…; expected a number"),
    "huge digits": ("jsonl", b'\n\n{"text":"a","score":' + b"9" * 5000 + b"}", SPOT + r"not JSON \("),
    "too deep": ("jsonl", b"\n\n" + b"[" * 100_000, SPOT + r"not JSON \("),
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
    path.write_bytes(b"text\tscore\n" + b"good\t1\n" * 50_000 + b"caf\xe9\t1\n")
    with pytest.raises(DataError, match="a byte that is not UTF-8"):
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
    with pytest.raises(DataError, match=r"folder.tsv: no such file"):
        read_rows(tmp_path / "folder.tsv", VALUE)


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "rows.parquet", [{"text": "a", "score": 1.0}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"install mbert\[parquet\]"):
        read_rows(tmp_path / "rows.parquet", VALUE)


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    assert find_file(tmp_path, "train") is None
    (tmp_path / "train.csv").touch()
    assert find_file(tmp_path, "train") == tmp_path / "train.csv"
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"train.csv and train.jsonl; expected one file for the split 'train'"):
        find_file(tmp_path, "train")


@pytest.mark.parametrize(("value", "index"), [("no", 0), ("yes", 1)])
def test_a_label_is_an_index_into_the_tasks_labels(value: str, index: int) -> None:
    assert parse_label("here", PAIR, value) == index


@pytest.mark.parametrize(("value", "index"), [("3", 3), (3, 3), (3.0, 3)])
def test_whole_numbers_name_labels_however_a_format_keeps_them(sst: Task, value: Any, index: int) -> None:
    assert parse_label("here", sst, value) == index


def test_labels_with_a_decimal_point_are_found_as_they_stand() -> None:
    task = Task(name="t", kind="classify", text=("a",), metrics=("f1",), labels=("1.0", "2.0"))
    assert [parse_label("here", task, value) for value in ("2.0", 2.0)] == [1, 1]


@pytest.mark.parametrize("value", ["5", 5, -1, 1.5, "", None, True, float("nan"), float("inf"), "1.0", " 1", [1]])
def test_a_label_that_the_task_lacks_is_refused_with_the_ones_it_has(sst: Task, value: Any) -> None:
    with pytest.raises(DataError, match=r"here: label .*; expected one of 0, 1, 2, 3, 4; correct the line"):
        parse_label("here", sst, value)


@settings(deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers())
def test_a_value_is_taken_exactly_within_its_range(value: float) -> None:
    if -1.0 <= value <= 2.5:
        assert parse_label("here", VALUE, str(value)) == value
    else:
        with pytest.raises(DataError, match=r"expected a number from -1 to 2\.5"):
            parse_label("here", VALUE, str(value))


def numbered(count: int) -> Rows:
    return Rows(tuple((f"text {n}",) for n in range(count)), tuple(float(n) for n in range(count)), "here")


@settings(deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(1, 400), st.integers(0, 2**40))
def test_held_out_rows_are_apart_complete_and_repeat(count: int, share: float, limit: int, seed: int) -> None:
    rows = numbered(count)
    expected = min(round(count * share), limit)
    if not 0 < expected < count:
        with pytest.raises(DataError, match="enough rows to hold out"):
            hold_out(rows, share, limit, seed)
        return
    kept, held = hold_out(rows, share, limit, seed)
    assert len(held) == expected
    assert sorted(kept.texts + held.texts) == sorted(rows.texts)
    for part in (kept, held):
        assert part.labels is not None
        assert [f"text {int(label)}" for label in part.labels] == [text for (text,) in part.texts]
        assert list(part.labels) == sorted(part.labels), "rows stay in their order"
    assert hold_out(rows, share, limit, seed) == (kept, held)


def test_other_seeds_hold_out_other_rows() -> None:
    assert len({hold_out(numbered(100), 0.2, 100, seed)[1].texts for seed in range(5)}) == 5


def test_every_row_is_held_out_about_as_often() -> None:
    counts = np.zeros(20)
    for seed in range(400):
        labels = hold_out(numbered(20), 0.25, 100, seed)[1].labels
        assert labels is not None
        counts[np.array(labels, dtype=int)] += 1
    assert abs(counts - 100).max() < 40  # 100 ± 4.6 standard deviations of a fair draw


@pytest.mark.parametrize(
    "other",
    [
        Rows((("a", "b"),), (2.0,), "here"),
        Rows((("a", "c"),), (1.0,), "here"),
        Rows((("ab", ""),), (1.0,), "here"),
        Rows((("a", "b"),), None, "here"),
        Rows((("a", "b"), ("a", "b")), (1.0, 1.0), "here"),
        Rows((("b", "a"),), (1.0,), "here"),
    ],
)
def test_a_fingerprint_tells_rows_apart(other: Rows) -> None:
    rows = Rows((("a", "b"),), (1.0,), "here")
    assert rows.fingerprint() == Rows((("a", "b"),), (1.0,), "elsewhere").fingerprint()
    assert rows.fingerprint() != other.fingerprint()


def test_rows_are_taken_in_the_order_asked_for() -> None:
    assert numbered(5).take([3, 0, 3]) == Rows((("text 3",), ("text 0",), ("text 3",)), (3.0, 0.0, 3.0), "here")


def test_a_stream_is_read_like_a_file() -> None:
    content = '\ufeffone\ttwo\n"a ""b"""\t"c\nd"\n'.encode()
    records = read_table("standard input", content, PAIR.text)
    assert parse_rows("standard input", records, PAIR, labelled=False).texts == (('a "b"', "c\nd"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input: it is empty"),
        (b"one\ttwo\n", "standard input: no rows"),
        (b"one\na\n", r"standard input: no column 'two' \(found: one\)"),
        (b"one\ttwo\n\xff\tb\n", "standard input: a byte that is not UTF-8"),
        (b"one\ttwo\na\n", "standard input, line 2: 1 cells; expected 2 cells"),
    ],
)
def test_a_bad_stream_is_told(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_rows("standard input", read_table("standard input", content, PAIR.text), PAIR, labelled=False)


def test_only_the_columns_asked_for_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tscore\na\t1\n")
    assert list(read_records(path, ["text"])) == [("line 2", {"text": "a", "score": "1"})]


def test_built_in_tasks_read_their_files(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tlabel\nA.\tB.\t4.25\n")
    assert read_rows(tmp_path / "dev.tsv", get_task("sts")) == Rows((("A.", "B."),), (4.25,), str(tmp_path / "dev.tsv"))
