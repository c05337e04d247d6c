"""The source code that decides what a merge is and what it answers: kept work of another source is not taken up."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

_DECIDING = ("hardware.py", "data", "encoder", "adapters", "composing")


@functools.cache
def code() -> dict[str, str]:
    """What a finished merge owes to the code: a SHA-256 over the source that decides its answers, and versions."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [file for name in _DECIDING for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()};".encode() + file.read_bytes())
    return {"source": digest.hexdigest(), **{name: version(name) for name in ("torch", "transformers")}}
