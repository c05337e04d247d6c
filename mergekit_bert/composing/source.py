"""What decides a merge and its answers beside its inputs: kept work of another program or machine is not taken up."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

from mergekit_bert.hardware import processor

_DECIDING = ("hardware.py", "data", "encoder", "adapters", "training", "composing")


@functools.cache
def made_by() -> dict[str, str]:
    """What a finished merge owes to the program and the machine, whatever it is of.

    A SHA-256 over the source that decides its answers, versions, and the processor. The precision that ``auto`` picks
    is not among these, since it is found by timing: another pick on the same machine would lose what is finished. A
    method that picks one tells it in what it learned.
    """
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [file for name in _DECIDING for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()};".encode() + file.read_bytes())
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"source": digest.hexdigest(), **versions, "processor": processor()}
