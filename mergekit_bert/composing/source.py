"""The code version and machine that a merge's result depends on: checkpoints and caches of others are not used."""

import functools
import hashlib
import inspect
import secrets
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_bert.hardware import processor
from mergekit_bert.registry import added_records

_DECIDING = ("hardware.py", "data", "encoder", "adapters", "models", "training", "composing", "formats")


_SESSION = secrets.token_hex(16)
"""Used for plug-ins whose source code is not available: their results are not reused by other processes."""


def made_by() -> dict[str, str]:
    """Everything besides its inputs that the result of a merge depends on.

    A SHA-256 of the relevant source code, versions, the processor, and a SHA-256 of the source of loaded third-party
    plug-ins, if any. The precision chosen by ``auto`` is not included, because it is chosen by timing and finished
    results would be lost if it changed. Methods that choose a precision record it in their trace.
    """
    foreign = sorted({text for record in added_records() for text in _sources(record)})
    return _program() | ({"plugins": hashlib.sha256("\0".join(foreign).encode()).hexdigest()} if foreign else {})


@functools.cache
def _program() -> dict[str, str]:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [file for name in _DECIDING for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()};".encode() + file.read_bytes())
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"source": digest.hexdigest(), **versions, "processor": processor()}


def _sources(record: Any) -> Iterator[str]:
    """The source of every module outside mbert that a record's class or functions come from; in a notebook theirs."""
    waiting = [type(record), *vars(record).values()]
    while waiting:
        one = waiting.pop()
        if isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif callable(one) and not str(getattr(one, "__module__", "")).startswith("mergekit_bert."):
            yield _source(one)


def _source(one: Any) -> str:
    for place in (inspect.getmodule(one), one):
        try:
            return inspect.getsource(place)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return _SESSION
