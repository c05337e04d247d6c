"""Options of a config record, each documented where it is defined. The command line makes its flags from them."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from mergekit_bert.errors import ArgumentError


def option(
    default: Any,
    text: str,
    shown: str | None = None,
    low: int | float | None = None,
    high: int | float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field with the help text of its flag; ``shown`` describes a default that is computed later.

    ``low`` and ``high`` (inclusive) and ``choices`` limit its values, see :func:`allowed_values`.
    """
    metadata = {"help": text, "shown": shown, "low": low, "high": high, "choices": tuple(choices)}
    return field(default=default, metadata=metadata)


def allowed_values(metadata: Any, kind: type) -> str:
    """The allowed values of an option, in words."""
    if metadata["choices"]:
        return f"one of {', '.join(metadata['choices'])}"
    noun = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")
    low, high = metadata["low"], metadata["high"]
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    return noun if low is None else f"{noun} of at least {low}"


def read_pairs(texts: Sequence[str]) -> dict[str, str]:
    """``["density=0.2"]`` as names and values; raises ArgumentError."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = (word.strip() for word in text.partition("="))
        if not sign or not name or not value or name in found:
            raise ArgumentError("`options`", f"{text!r}", "NAME=VALUE, each name once", "correct it")
        found[name] = value
    return found
