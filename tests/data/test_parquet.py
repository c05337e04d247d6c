"""Parquet from strangers: odd types, broken texts and files that unpack to far more than they are, each one line."""

import datetime
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mergekit_bert.data import readers
from mergekit_bert.data.readers import read_records
from mergekit_bert.data.rows import read_rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError

VALUE = Task(name="value", kind="regress", text=("text",), metrics=("pearson",), label="score", range=(-1.0, 2.5))
KIND = Task(name="kind", kind="classify", text=("text",), metrics=("f1",), labels=("1", "2", "True", "2020-01-01"))


def write(path: Path, text: Any, label: Any, name: str = "score", **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": text, name: label}), path, **options)
    return path


def broken(words: Sequence[bytes]) -> pyarrow.Array:
    """Bytes that call themselves texts."""
    return pyarrow.array(words, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("group", [1, 2, 9])
def test_a_text_that_is_not_utf8_is_told_with_its_row(tmp_path: Path, dictionary: bool, group: int) -> None:
    words = broken([b"a", b"b", b"a", b"\xff\xfe", b"b"])
    path = write(tmp_path / "a.parquet", words, [1.0] * 5, use_dictionary=dictionary, row_group_size=group)
    with pytest.raises(DataError, match=r"a\.parquet, row 4: a text that is not UTF-8 \(invalid start byte\)"):
        read_rows(path, VALUE)


NS = pyarrow.timestamp("ns")
ODD: dict[str, tuple[Any, Any, str]] = {
    "timestamps": (["a"], pyarrow.array([2**62], NS), r"column 'score' of type timestamp\[ns\]; expected texts or"),
    "far timestamps": (
        ["a"],
        pyarrow.array([2**53], pyarrow.timestamp("s")),
        r"column 'score' of type timestamp\[ms\]",
    ),
    "dates": (["a"], [datetime.date(2020, 1, 1)], r"column 'score' of type date32\[day\]; expected texts or numbers"),
    "lists": ([["a"]], [1.0], r"column 'text' of type list<"),
    "structs": ([{"a": "b"}], [1.0], r"column 'text' of type struct<"),
    "bytes": ([b"a"], [1.0], r"column 'text' of type binary; "),
    "numbers": ([7], [1.0], r"row 1: 7 in column 'text'; expected text"),
    "nothing": (pyarrow.array([None], pyarrow.string()), [1.0], r"row 1: nothing in column 'text'; expected text"),
    "a column of nothing": ([None], [1.0], r"row 1: nothing in column 'text'; expected text"),
    "no label": (["a"], pyarrow.array([None], pyarrow.float64()), r"row 1: label None; expected a number"),
    "a truth": (["a"], [True], r"row 1: label True; expected a number"),
    "NaN": (["a"], [float("nan")], r"row 1: label nan; expected a number"),
    "infinite": (["a"], [float("inf")], r"row 1: label inf; expected a number"),
    "a decimal": (["a"], [Decimal("9.5")], r"row 1: label Decimal\('9.5'\); expected a number"),
    "a word": (["a"], ["high"], r"row 1: label 'high'; expected a number"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_neither_text_nor_number_is_one_line(tmp_path: Path, case: str) -> None:
    text, label, message = ODD[case]
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path / "a.parquet", text, label), VALUE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([Decimal("1"), Decimal("2")], (0.0, 1.0)),
        ([1, 2], (0.0, 1.0)),
        ([1.0, 2.0], (0.0, 1.0)),
        ([True, True], (2.0, 2.0)),
        (["2020-01-01", "1"], (3.0, 0.0)),
        (pyarrow.array(["1", "2"]).dictionary_encode(), (0.0, 1.0)),
        (pyarrow.array(["1", "2"], pyarrow.large_string()), (0.0, 1.0)),
        (pyarrow.array([1, 2], pyarrow.float16()), (0.0, 1.0)),
    ],
)
def test_labels_are_found_whatever_plain_type_holds_them(tmp_path: Path, labels: Any, expected: tuple[float]) -> None:
    assert read_rows(write(tmp_path / "a.parquet", ["a", "b"], labels, "label"), KIND).labels == expected


def test_only_the_columns_that_are_wanted_are_read(tmp_path: Path) -> None:
    odd = {"when": [datetime.date(2020, 1, 1)], "words": broken([b"\xff"]), "more": ["m"], "list": [[1]]}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "score": [1.0], **odd}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", VALUE).texts == (("a",),)
    found = list(read_records(tmp_path / "a.parquet", ["text"], also=["more", "none"]))
    assert found == [("row 1", {"text": "a", "more": "m"})]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns 'text'; expected one of each; rename the others"):
        list(read_records(tmp_path / "a.parquet", ["text"]))


def test_rows_keep_their_order_over_groups(tmp_path: Path) -> None:
    words = [f"text {number % 7}" for number in range(100)]
    path = write(tmp_path / "a.parquet", words, [number / 50 for number in range(100)], row_group_size=9)
    found = read_rows(path, VALUE)
    assert found.texts == tuple((word,) for word in words)
    assert found.labels == tuple(number / 50 for number in range(100))


def test_a_long_text_that_comes_a_million_times_is_refused_and_never_unpacked(tmp_path: Path) -> None:
    """The file has 60 KB, its rows 1 TB: who makes them texts of their own is killed."""
    indices = pyarrow.array([0] * 1_000_000, pyarrow.int32())
    word = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 2**20]))
    path = write(tmp_path / "a.parquet", word, [1.0] * 1_000_000, compression="zstd")
    assert path.stat().st_size < 100_000
    with pytest.raises(
        DataError, match=r"more than [67]\d,\d{3},\d{3} characters; expected a smaller table; give a part"
    ):
        read_rows(path, VALUE)


def test_what_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ["x" * 5000, "y" * 5000], [1.0, 2.0], compression="zstd")
    assert path.stat().st_size < 4000
    monkeypatch.setattr(readers, "MAX_PARQUET", 9000)
    with pytest.raises(DataError, match=r"a.parquet: 10,\d+ bytes once unpacked; expected a smaller table"):
        read_rows(path, VALUE)


def test_a_file_that_is_encrypted_cut_or_of_another_kind_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a"] * 9, [1.0] * 9)
    whole = path.read_bytes()
    for content in (whole[:-4] + b"PARE", whole[:-9], whole[9:], whole[:4] + whole[-4:], b"PK\x03\x04" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.parquet: not readable as Parquet \(.*\); expected a Parquet") as caught:
            read_rows(path, VALUE)
        assert "\n" not in str(caught.value)
