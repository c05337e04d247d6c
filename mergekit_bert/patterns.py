"""Patterns of layer names: regular expressions that match in time linear in the name, whoever wrote them.

RE2 does the matching (Cox 2007, "Regular Expression Matching Can Be Simple And Fast"). It knows neither lookaround
nor backreferences, which cannot be matched in linear time.
"""

import functools
from collections.abc import Iterable
from typing import Any

from mergekit_bert.text import printable

MAX_LENGTH = 500
"""Characters of one pattern."""
_MAX_TOTAL = 20_000
"""Instructions of all patterns of one set together: what a name may cost."""


class PatternError(ValueError):
    """Not a pattern that can be used; ``str(error)`` says why."""


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    import re2

    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"{len(pattern)} characters, more than {MAX_LENGTH}")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "malformed"
        told = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise PatternError(printable(told, 100)) from error
    except UnicodeEncodeError as error:
        raise PatternError("no valid text") from error


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise :class:`PatternError` unless all ``patterns`` can be used together."""
    total = 0
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PatternError(f"a {type(pattern).__name__}, not a text")
        # A pattern stands alone: "a)|(b" must not become one by the brackets around it.
        _compiled(pattern)
        total += _compiled(pattern).programsize
        if total > _MAX_TOTAL:
            raise PatternError("patterns too large")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the whole of ``name``; raises :class:`PatternError`."""
    return _compiled(pattern).fullmatch(name) is not None


def matches_ending(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name``, whole or from a dot on: PEFT's rule."""
    return _compiled(rf"(?:(?s:.*)\.)?(?:{pattern})").fullmatch(name) is not None
