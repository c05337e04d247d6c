"""Arguments against their annotations: what is taken, what is refused in one line, and what a field becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import InstanceOf

from mergekit_bert.arguments import Location, check_types, checked
from mergekit_bert.errors import ArgumentError


class Thing:
    """What is no type of pydantic's."""


@checked
def call(one: InstanceOf[Thing] | Location, *, names: Sequence[str] = (), share: float = 0.5, **more: Any) -> Any:
    """Arguments as they are seen inside."""
    return one, names, share, more


def test_what_fits_is_passed_on() -> None:
    thing, names = Thing(), ["a", "b"]
    assert call(thing, names=names, share=2, other=b"x") == (thing, names, 2.0, {"other": b"x"})
    assert call(Path("x"))[0] == Path("x")
    assert call.__name__ == "call"
    assert call.__doc__ == "Arguments as they are seen inside."


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a union": ((3,), {}, "`one` of call: 3 (int); expected an instance of Thing or a text or a path; correct it"),
    "inside": (("x",), {"names": ["a", 3]}, "`names` of call: 3 (int); expected a text; correct it"),
    "a text for a list": (("x",), {"names": "abc"}, "`names` of call: 'abc' (str); expected a list; correct it"),
    "true": (("x",), {"share": True}, "`share` of call: True (bool); expected a number; correct it"),
    "none": ((), {}, "`one` of call: nothing; expected one, names, share, more; correct it"),
    "surplus": (
        ("x", "y"), {}, "`names` of call: one argument too many; expected one, names, share, more; correct it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line(case: str) -> None:
    given, named, message = WRONG[case]
    with pytest.raises(ArgumentError) as caught:
        call(*given, **named)
    assert str(caught.value) == message


def test_an_error_from_inside_comes_out_as_it_is() -> None:
    @checked
    def fail(one: int) -> None:
        raise KeyError(one)

    with pytest.raises(KeyError):
        fail(3)


def test_fields_are_checked_by_their_type_and_whole_numbers_become_floats() -> None:
    @dataclass(frozen=True)
    class Record:
        weights: Annotated[Mapping[str, float], "more than a type"]
        count: int | None = None

        def __post_init__(self) -> None:
            check_types(self)

    assert [type(one) for one in Record({"a": 1}).weights.values()] == [float]
    for wrong in ({"weights": {"a": "1"}}, {"weights": {}, "count": 1.0}, {"weights": [("a", 1.0)]}):
        with pytest.raises(ArgumentError, match="` of Record: "):
            Record(**wrong)  # type: ignore[arg-type]
