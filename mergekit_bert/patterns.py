"""Patterns of layer names: regular expressions that match in time linear in the name, whoever wrote them.

RE2 does the matching (Cox 2007, "Regular Expression Matching Can Be Simple And Fast"). It knows neither lookaround
nor backreferences, which cannot be matched in linear time. Otherwise a pattern means what it means to Python's
``re``, and so to PEFT: what only one of the two knows is refused.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

from mergekit_bert.text import printable

MAX_LENGTH = 4000
"""Characters of one pattern."""
_MAX_TOTAL = 20_000
"""Instructions of all patterns of one set together: what a name may cost, some milliseconds."""
_MEMORY = 1 << 20
"""Bytes for a pattern's program and its states."""
_CHOICES = frozenset("*+?{|[")
"""What makes a pattern slow; one without counts for little, since each site may have one of its own."""
_PLAIN = 10
_OTHERWISE = ("{,", "[:", "[[")
"""What RE2 takes without complaint, and otherwise than Python does or will."""


class PatternError(ValueError):
    """Not a pattern that can be used; ``str(error)`` says why."""


@functools.lru_cache(maxsize=4096)
def _whole(pattern: str) -> Any:
    """RE2's program for whole names."""
    _check_syntax(pattern)
    return _program(pattern)


@functools.lru_cache(maxsize=4096)
def _ending(pattern: str) -> Any:
    """RE2's program for names, whole or from a dot on; ``a)|(b`` does not become a pattern by the brackets."""
    _check_syntax(pattern)
    return _program(rf"(?:.*\.)?(?:{pattern})")


def _program(text: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    try:
        return re2.compile(text, options)
    except re2.error as error:
        told = error.args[0].decode("utf-8", "replace")
        raise PatternError(printable(f"{told}; RE2 knows neither lookaround nor backreferences", 150)) from error


def _check_syntax(pattern: str) -> None:
    """Raise :class:`PatternError` unless ``pattern`` is short, and one of Python's that means the same to RE2."""
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"{len(pattern)} characters, more than {MAX_LENGTH}")
    if not pattern.isascii():  # which keeps sets of characters small, too
        raise PatternError("a character beyond ASCII")
    for sign in _OTHERWISE:
        if sign in pattern:
            raise PatternError(f"{sign!r}, which is not the same everywhere")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise PatternError(printable(str(error), 100)) from error
    except RecursionError as error:
        raise PatternError("nested too deeply") from error


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise :class:`PatternError` unless all ``patterns`` can be used together."""
    total = 0
    for pattern in patterns:
        try:
            size = _ending(pattern).programsize
        except PatternError as error:
            raise PatternError(f"{printable(pattern, 100)!r} ({error})") from error
        total += _PLAIN + len(pattern) // 8 if _CHOICES.isdisjoint(pattern) else size
        if total > _MAX_TOTAL:
            raise PatternError("too many patterns, or too large ones")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the whole of ``name``; raises :class:`PatternError`."""
    return _whole(pattern).fullmatch(name) is not None


def matches_ending(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name``, whole or from a dot on: PEFT's rule. Raises :class:`PatternError`."""
    return _ending(pattern).fullmatch(name) is not None


def exactly(names: Iterable[str]) -> str:
    """A pattern of ``names`` and no others; those that differ in their first number alone are one alternative."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, *rest = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        alike.setdefault((head, *rest[1:]), []).extend(rest[:1])
    return "|".join(_one_of(numbers).join(map(re.escape, texts)) for texts, numbers in alike.items())


def _one_of(numbers: list[str]) -> str:
    return f"({'|'.join(numbers)})" if len(numbers) > 1 else "".join(numbers)
