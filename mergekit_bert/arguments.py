"""Arguments of public functions and fields of public records, checked against their annotations by pydantic.

Types are not converted beyond what Python itself takes for one another (an int for a float); what a number may be is
for the function to say.
"""

import dataclasses
import errno
import functools
import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, validate_call

from mergekit_bert.errors import ArgumentError
from mergekit_bert.schema import in_words

F = TypeVar("F", bound=Callable[..., Any])
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def reachable(path: str | Path) -> str | Path:
    """``path``; raises ValueError, with what was expected, for one that no file system takes."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise ValueError("a path without null characters") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("a path that is not too long for the file system") from error
    return path


Location = Annotated[str | Path, AfterValidator(reachable)]
"""A path, or a name that may be one: whether anything is there is not asked."""


def checked(function: F) -> F:
    """``function``, with an :class:`~mergekit_bert.errors.ArgumentError` for arguments that do not fit its annotations.

    Missing, unknown and surplus arguments end so too.
    """
    names = list(inspect.signature(function).parameters)

    @functools.cache
    def validated() -> Any:
        return validate_call(config=_STRICT)(function)

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        try:
            return validated()(*given, **named)
        except ValidationError as error:
            raise _refused(function.__name__, error, names=names) from error

    return run  # type: ignore[return-value]


def check_types(record: Any) -> None:
    """Raise :class:`~mergekit_bert.errors.ArgumentError` for a field of a dataclass that is not of its type.

    Whole numbers become floats where the fields say so, as they do when a record is read from a file.
    """
    kind: Any = type(record)
    for name, adapter in _fields(kind).items():
        try:
            object.__setattr__(record, name, adapter.validate_python(getattr(record, name)))
        except ValidationError as error:
            raise _refused(kind.__name__, error, name) from error


def from_text(kind: type[Any], name: str, text: str) -> Any:
    """``text`` as a value of the field ``name`` of the dataclass ``kind``; raises ArgumentError."""
    adapter = TypeAdapter(get_type_hints(kind)[name], config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.validate_strings(text)
    except ValidationError as error:
        raise _refused(kind.__name__, error, name) from error


@functools.cache
def _fields(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind)  # without what files may say beyond the type
    return {one.name: TypeAdapter(hints[one.name], config=_STRICT) for one in dataclasses.fields(kind)}


_UNBOUND = {
    "missing_argument": "nothing",
    "missing_positional_only_argument": "nothing",
    "unexpected_keyword_argument": "an argument that it does not take",
    "unexpected_positional_argument": "one argument too many",
}
"""What is wrong where arguments and parameters do not go together, by pydantic's type of the error."""


def _refused(called: str, error: ValidationError, parameter: str = "", names: Sequence[str] = ()) -> ArgumentError:
    """The first argument that is wrong, what stands there, and all that may (a union has one error for each type)."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    for part in () if parameter else first["loc"][:1]:
        parameter = part if isinstance(part, str) else names[min(part, len(names) - 1)]
    if first["type"] in _UNBOUND:
        return ArgumentError(f"`{parameter}` of {called}", _UNBOUND[first["type"]], f"{', '.join(names)}", "correct it")
    found = first["input"]
    alike = [one for one in errors if one["input"] is found and (not names or one["loc"][:1] == first["loc"][:1])]
    expected = " or ".join(dict.fromkeys(in_words(one["msg"]) for one in alike))
    return ArgumentError(
        f"`{parameter}` of {called}", f"{reprlib.repr(found)} ({type(found).__name__})", expected, "correct it"
    )
