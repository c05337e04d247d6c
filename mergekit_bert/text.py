"""Text from files and users, made fit to be shown: control characters escaped, long texts cut."""

import re

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
"""Controls (but tab and line ends), line separators, overrides of text direction, and lone surrogates."""


def printable(text: str, limit: int | None = None) -> str:
    """``text`` with what could steer a terminal written as escapes (``\\x1b``), cut to ``limit`` characters."""
    start = text if limit is None else text[: limit + 1]
    shown = _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), start)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def one_line(text: str, limit: int | None = None) -> str:
    """:func:`printable`, with every run of white space as one space."""
    return printable(" ".join(text[: 4 * limit].split() if limit is not None else text.split()), limit)


def has_control_characters(text: str) -> bool:
    """Whether ``text`` holds anything that :func:`printable` escapes, a tab or a line end."""
    return _UNPRINTABLE.search(text) is not None or re.search(r"[\t\n\r]", text) is not None
