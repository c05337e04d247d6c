"""Records from files: each field is checked, nothing is converted, and what is wrong is told in one line."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model

from mergekit_bert.errors import DataError
from mergekit_bert.schema import (
    STRICT,
    BaseName,
    Count,
    Finite,
    Length,
    Name,
    Plain,
    Rank,
    Schema,
    SchemaError,
    Seed,
    Sha256,
    Shape,
    Size,
    Text,
    Width,
    validate,
)
from mergekit_bert.strict import Before


@dataclass(frozen=True)
class Inner:
    """A dataclass of the package, with a check of its own."""

    low: float
    high: float = 1.0

    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        """What no field alone shows."""
        if not self.low < self.high:
            raise DataError("inner", f"{self.low}", "less", "correct it")


def _upper(value: Any) -> Any:
    if value == "no":
        raise ValueError("no is no answer")
    return value.upper() if isinstance(value, str) else value


@dataclass(frozen=True)
class Record:
    name: Name
    number: int = 0
    share: Finite = 0.0
    flag: bool = False
    texts: tuple[Text, ...] = ()
    inner: Inner | None = None
    by_name: dict[str, int] = field(default_factory=dict)
    word: Annotated[str, Before(_upper)] = ""

    __pydantic_config__: ClassVar = STRICT


class File(Schema):
    record: Record
    size: Size | None = None


def test_plain_json_becomes_the_record() -> None:
    value = {"name": "x", "number": 3, "share": 2, "flag": True, "texts": ["a", "b"], "inner": {"low": 0}}
    value |= {"by_name": {"z": 1, "a": 2}, "word": "ja"}
    expected = Record("x", 3, 2.0, True, ("a", "b"), Inner(0.0), {"z": 1, "a": 2}, "JA")
    found = validate(Record, value)
    assert found == expected
    assert (type(found.share), list(found.by_name)) == (float, ["z", "a"]), "whole numbers are floats, order is kept"
    assert validate(File, {"record": value, "size": [3, 4]}) == File(record=expected, size=(3, 4))


ODD: dict[str, tuple[Any, str]] = {
    "no mapping": ([], ""),
    "nothing": (None, ""),
    "a missing field": ({}, "name: "),
    "an unknown field": ({"name": "x", "colour": 1}, "colour: "),
    "a number for a text": ({"name": 1}, "name: "),
    "null for a text": ({"name": None}, "name: "),
    "an empty name": ({"name": ""}, "name: "),
    "a long name": ({"name": "x" * 501}, "name: "),
    "a control character": ({"name": "x\x1b[0m"}, "name: .*control characters"),
    "a line end": ({"name": "x\ny"}, "name: .*control characters"),
    "half a pair": ({"name": "\udc80"}, ""),
    "a text for a number": ({"name": "x", "number": "3"}, "number: "),
    "a fraction for a whole number": ({"name": "x", "number": 1.5}, "number: "),
    "1.0 for a whole number": ({"name": "x", "number": 1.0}, "number: "),
    "true for a number": ({"name": "x", "number": True}, "number: "),
    "1 for true": ({"name": "x", "flag": 1}, "flag: "),
    "true for a share": ({"name": "x", "share": True}, "share: "),
    "NaN": ({"name": "x", "share": math.nan}, ""),
    "infinity": ({"name": "x", "share": math.inf}, ""),
    "a text for a list": ({"name": "x", "texts": "ab"}, "texts: "),
    "a number in a list": ({"name": "x", "texts": ["a", 1]}, "texts.1: "),
    "a list for a record": ({"name": "x", "inner": [0, 1]}, "inner: "),
    "a wrong field inside": ({"name": "x", "inner": {"low": "0"}}, "inner.low: "),
    "an unknown field inside": ({"name": "x", "inner": {"low": 0, "x": 1}}, "inner.x: "),
    "what is changed first": ({"name": "x", "word": "no"}, "word: no is no answer"),
    "no JSON": ({"name": object()}, ""),
    "a number of many digits": ({"name": "x", "number": 10**5000}, ""),
}


@pytest.mark.parametrize("name", ODD)
def test_what_does_not_fit_is_told_in_one_line(name: str) -> None:
    value, message = ODD[name]
    with pytest.raises(SchemaError, match=f"^{message}") as caught:
        validate(Record, value)
    assert str(caught.value).isprintable()
    assert 0 < len(str(caught.value)) <= 300
    with pytest.raises(SchemaError):
        validate(File, {"record": value})


def test_a_record_that_contradicts_itself_says_so_itself() -> None:
    with pytest.raises(DataError, match=r"inner: 2\.0; expected less"):
        validate(Record, {"name": "x", "inner": {"low": 2}})


def test_the_first_of_many_is_told_and_how_many_more() -> None:
    with pytest.raises(SchemaError, match=r"^number: .* and 2 more$"):
        validate(Record, {"name": "x", "number": "1", "flag": 0, "share": "2"})


BOUNDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "Text": (Text, ["", "x" * 10_000], ["x" * 10_001, "\0", "a\tb", None]),
    "BaseName": (BaseName, ["/a/b", "x" * 4096], ["", "x" * 4097, "a\nb"]),
    "Sha256": (Sha256, ["0" * 64], ["0" * 63, "A" * 64, "0" * 64 + "\n", "g" * 64]),
    "Count": (Count, [0, 2**53 - 1], [-1, 2**53, 1.0]),
    "Seed": (Seed, [-(2**63), 2**63 - 1], [2**63, "0"]),
    "Width": (Width, [1, 2**24], [0, 2**24 + 1]),
    "Rank": (Rank, [0, 2**16], [-1, 2**16 + 1]),
    "Length": (Length, [1, 2**20], [0, -1, 2**20 + 1, 2**63, "x"]),
    "Finite": (Finite, [0, -1.5, 1e300], ["1", True, None]),
    "Shape": (Shape, [[], [0, 2**31], [1] * 8], [[-1], [2**31 + 1], [1] * 9, 3]),
    "Size": (Size, [[1, 2]], [[1], [1, 2, 3], [0, 1], "12"]),
    "Plain": (Plain, [None, 1, "a", {"a": [True, {"b": "c"}]}], ["\x1b", {"a": ["b\n"]}, {"\x07": 1}, [["\x9b"]]]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_holds_on_both_sides(name: str) -> None:
    kind, good, bad = BOUNDS[name]
    record = create_model("Bounded", __base__=Schema, value=(kind, ...))
    for value in good:
        validate(record, {"value": value})
    for value in bad:
        with pytest.raises(SchemaError, match="value"):
            validate(record, {"value": value})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
JSON = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3)
)
FIELDS = st.sampled_from(["name", "number", "share", "flag", "texts", "inner", "by_name", "word"])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(FIELDS, JSON, max_size=8) | JSON)
def test_any_value_is_a_record_or_refused(value: Any) -> None:
    with contextlib.suppress(SchemaError, DataError):
        found = validate(Record, value)
        assert isinstance(found, Record)
        assert all(type(one) is str for one in (found.name, found.word, *found.texts))
        assert (type(found.number), type(found.share), type(found.flag)) == (int, float, bool)
        assert math.isfinite(found.share)
