"""Rows: plain text, labels, held-out rows, and what tells rows apart."""

import datetime
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_bert.data import rows
from mergekit_bert.data.readers import tsv_text
from mergekit_bert.data.rows import Rows, find_file, hold_out, parse_label, read_rows, read_texts
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.errors import DataError

PAIR = Task(name="pair", kind="classify", text=("one", "two"), metrics=("accuracy",), labels=("no", "yes", "ja\tnein"))
VALUE = Task(name="value", kind="regress", text=("text",), metrics=("pearson",), label="score", range=(-1.0, 2.5))


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
    lines = data.draw(st.lists(row, min_size=1, max_size=6))
    (tmp_path / "rows.tsv").write_bytes(tsv_text([task.text, *lines]).encode())
    table = read_rows(tmp_path / "rows.tsv", task, labelled=False)
    text = end.join("\t".join(row) for row in lines)
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
    "a table of pairs": (
        "a.tsv",
        b"one\ttwo\tlabel\n",
        PAIR,
        r"{path}, line 1: 3 texts .*header belongs into `data=DIR`",
    ),
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
    with pytest.raises(DataError, match=r"none.txt: no such file; "):
        read_texts(tmp_path / "none.txt", VALUE)


def test_plain_text_is_read_from_no_folder_and_no_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    for path, found in ((tmp_path, "a folder"), (tmp_path / "fifo.txt", "no regular file")):
        with pytest.raises(DataError, match=f"{path}: {found}; expected a data file"):
            read_texts(path, VALUE)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "{}\n"), ("a.tsv", "text\n{}\n"), ("a.jsonl", '{{"text": "{}"}}')]
)
def test_a_text_is_as_long_as_it_may_be_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    monkeypatch.setattr(rows, "MAX_TEXT", 10)
    read = read_texts if name == "a.txt" else lambda path, task: read_rows(path, task, labelled=False)
    (tmp_path / name).write_text(content.format("é" * 10), encoding="utf-8")
    assert read(tmp_path / name, VALUE).texts == (("é" * 10,),)
    (tmp_path / name).write_text(content.format("é" * 11), encoding="utf-8")
    with pytest.raises(DataError, match=r"line \d: 11 characters in column 'text'; expected at most 10; shorten"):
        read(tmp_path / name, VALUE)


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


@pytest.mark.parametrize(
    "value",
    ["1_0", "", "0x1", [1], {"a": 1}, None, True, datetime.date(2020, 1, 1), Decimal("NaN"), Decimal("sNaN"), 10**400],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"here: label .*; expected a number from -1 to 2\.5; correct the line"):
        parse_label("here", VALUE, value)


def test_decimals_are_numbers_and_labels(sst: Task) -> None:
    assert parse_label("here", VALUE, Decimal("1.25")) == 1.25
    assert parse_label("here", sst, Decimal("3")) == 3


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


def test_built_in_tasks_read_their_files(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tlabel\nA.\tB.\t4.25\n")
    assert read_rows(tmp_path / "dev.tsv", get_task("sts")) == Rows((("A.", "B."),), (4.25,), str(tmp_path / "dev.tsv"))
