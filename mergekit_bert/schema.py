"""Validated records: what a file says is checked field by field before it is believed, by pydantic and in one way.

A schema is a frozen dataclass, or a :class:`Schema` where only a file's layout is described. Unknown keys are
refused, types are not converted, numbers are finite and bounded, texts hold no control characters.
"""

import functools
import json
import re
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mergekit_bert.strict import STRICT as STRICT  # for those that import the validator anyway
from mergekit_bert.text import has_control_characters, one_line, printable

T = TypeVar("T")
_SHOULD = re.compile(r"^\w+ should (be |have )?")
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a mapping",
    "a valid dictionary": "a mapping",
    "a valid tuple": "a tuple",
    "an instance of Sequence": "a list",
    "'str' instances are not allowed as a Sequence value": "a list",
    "'bytes' instances are not allowed as a Sequence value": "a list",
    "an instance of Mapping": "a mapping",
    "an instance of Path": "a path",
}
"""What pydantic calls a kind of value, and what a file's author does."""


class SchemaError(ValueError):
    """A value that does not fit its schema; ``str(error)`` says where and why in one line.

    ``place`` is where, by keys with dots between them ("" for the whole); ``found`` is what stands there, cut, and
    ``expected`` what should.
    """

    def __init__(self, reason: str, place: str = "", found: str = "", expected: str = "") -> None:
        """Keep the parts, escaped and cut."""
        super().__init__(reason)
        self.place, self.found, self.expected = (one_line(text, 200) for text in (place, found, expected))


class Schema(BaseModel):
    """The layout of a record in a file."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def _plain(text: str) -> str:
    if has_control_characters(text):
        raise ValueError("Text should have no control characters")
    return text


def _plain_json(value: Any) -> Any:
    """``value`` as it is; its depth was bounded when it was read."""
    if isinstance(value, str):
        _plain(value)
    elif isinstance(value, list | tuple):
        for one in value:
            _plain_json(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            _plain(key)
            _plain_json(one)
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > _TEXT:
            raise ValueError(f"Text should have at most {_TEXT} characters")
        return _plain(value)
    if not isinstance(value, bool | int | float):
        raise ValueError("Value should be a number, a text, true or false")
    return value


_TEXT = 10_000

Text = Annotated[str, Field(max_length=_TEXT), AfterValidator(_plain)]
"""A text that may be shown."""
Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_plain)]
"""The name of a layer, a parameter, a task, a method …"""
BaseName = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain)]
"""The name of a base: on the Hub, or the path of a folder."""
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Width = Annotated[int, Field(ge=1, le=2**24)]
"""Features on one side of a layer (a vocabulary is the widest)."""
Rank = Annotated[int, Field(ge=0, le=2**16)]
Length = Annotated[int, Field(ge=1, le=2**20)]
"""Tokens of a text."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scalar = Annotated[Any, AfterValidator(_scalar)]
"""A number, a text, true or false: the value of an option."""
Shape = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=8)]
Size = tuple[Width, Width]
"""(out_features, in_features)."""
Plain = Annotated[Any, AfterValidator(_plain_json)]
"""JSON that is only shown: its depth and numbers were bounded by :mod:`mergekit_bert.documents`."""

Words = Annotated[str | Annotated[list[str], Field(max_length=10_000)], AfterValidator(_plain_json)]
"""A text, or several."""


@functools.cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def validate(kind: Callable[..., T], value: Any) -> T:
    """``value``, plain JSON, as a ``kind``: a :class:`Schema`, or a dataclass with ``__pydantic_config__ = STRICT``.

    Lists become tuples and whole numbers floats where the fields say so; mappings keep their order. Raises
    :class:`SchemaError`, or what the dataclass itself raises.
    """
    try:
        found: T = _adapter(kind).validate_json(json.dumps(value, allow_nan=False))
    except ValidationError as error:
        raise SchemaError(_first(error), *_parts(error)) from error
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise SchemaError(printable(" ".join(str(error).split()), 200)) from error
    return found


def _first(error: ValidationError) -> str:
    """The first of what is wrong, and how many more there are."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(str(part) for part in found[0]["loc"])
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    message = found[0]["msg"].removeprefix("Value error, ")
    return printable(f"{where}: {message[:1].lower()}{message[1:]}{more}" if where else f"{message}{more}", 300)


def _parts(error: ValidationError) -> tuple[str, str, str]:
    """Where the first is that is wrong, what stands there, and what should."""
    first = error.errors(include_url=False, include_context=False)[0]
    return ".".join(str(part) for part in first["loc"]), reprlib.repr(first["input"]), in_words(first["msg"])


def in_words(message: str) -> str:
    """What pydantic says that a value should be, in the words of a file's author."""
    expected = _SHOULD.sub("", message.removeprefix("Value error, "))
    return _WORDS.get(expected, expected)
