"""Files on disk: atomic writes, refusal to overwrite, and fingerprints."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mergekit_bert.errors import OutputError

Json = Any
SUFFIX = ".safetensors"


def canonical_json(value: Json) -> str:
    """``value`` as JSON that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Json) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of a file, or of the digests of all safetensors files of a folder, in the order of their names."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return fingerprint([file_fingerprint(part) for part in sorted(path.glob("*.safetensors"))])


def beside(model: Path, ending: str) -> Path:
    """What lies beside a model file or folder ``X`` (or ``X.safetensors``): ``X<ending>``."""
    return model.parent / f"{model.name.removesuffix(SUFFIX)}{ending}"


def refuse_existing(path: Path, force: bool) -> None:
    """Raise :class:`OutputError` when ``path`` exists and ``force`` was not given."""
    if path.exists() and not force:
        raise OutputError(str(path), "it exists already", "a new path", "choose another place or give --force")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            str(path), reason.lower(), "a place that can be written", "free space or choose another path"
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is flushed and becomes ``path`` when the block ends well."""
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: a killed process leaves the old file or none, never half of one."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Json) -> None:
    """Write ``value`` atomically as indented JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not."""
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield part
            part.chmod(0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
                os.replace(path, old / "old")
                os.replace(part, path)
                shutil.rmtree(old)
            else:
                os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextlib.contextmanager
def withdrawn(path: Path) -> Iterator[None]:
    """Remove the file or folder ``path`` when the block, which checks it, raises."""
    try:
        yield
    except Exception:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep_parts(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        remove(part)
