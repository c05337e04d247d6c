"""Messages of the library as the command line prints them: parameters in backticks become flags. Imports little."""

import re

_FLAGS = {
    "evaluations": "--search",
    "held_out": "--search-rows",
    "options": "--set",
    "over": "--search-over",
    "steps": "--calibrate",
}
"""Flags whose name differs from the parameter."""
_PARAMETER = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")


def in_flags(text: str) -> str:
    """``"correct `rank`"`` as ``"correct --rank"``, ``"`method=ties`"`` as ``"--method ties"``."""
    return _PARAMETER.sub(_flag, text)


def _flag(match: re.Match[str]) -> str:
    flag = _FLAGS.get(match[1], f"--{match[1].replace('_', '-')}")
    return flag if match[2] is None else f"{flag} {match[2]}"
