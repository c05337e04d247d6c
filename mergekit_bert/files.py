"""Files on disk: atomic writes, refusal to overwrite, and fingerprints.

What is written here may take the place of an older version: these are files that mbert keeps for itself. What a user
asked for is written through :mod:`mergekit_bert.outputs`.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mergekit_bert.errors import OutputError

Json = Any
SUFFIX = ".safetensors"
PART = ".part"


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
    return fingerprint([file_fingerprint(part) for part in sorted(path.glob("*.safetensors")) if part.is_file()])


def beside(model: Path, ending: str) -> Path:
    """What lies beside a model file or folder ``X`` (or ``X.safetensors``): ``X<ending>``."""
    return model.parent / f"{model.name.removesuffix(SUFFIX)}{ending}"


def kind_at(path: Path) -> str:
    """What lies at ``path``, following no link: "file", "folder", "symbolic link", …; "" for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "device or pipe")


def refuse_existing(path: Path, force: bool) -> None:
    """Raise :class:`OutputError` when anything lies at ``path``, a dangling link too, and ``force`` was not given."""
    if os.path.lexists(path) and not force:
        raise OutputError(str(path), "it exists already", "a new path", "choose another place or give `force`")


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the system says while ``path`` is written into an :class:`OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            str(path), reason.lower(), "a place that can be written", "free space or choose another path"
        ) from error


def replace(part: Path, path: Path) -> None:
    """Move ``part`` to ``path``, in the place of an older one: a file takes that of a file, a folder of a folder.

    Raises OutputError where something of another kind lies there, OSError where it cannot be moved.
    """
    kind = kind_at(path)
    if kind not in ("", kind_at(part)):
        raise OutputError(str(path), f"it is a {kind}", "a place that can be written", "choose another path")
    if kind != "folder":
        os.replace(part, path)
        return
    old = Path(tempfile.mkdtemp(prefix=part_prefix(path), suffix=PART, dir=path.parent))
    os.replace(path, old / "old")
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old / "old", path)
        os.rmdir(old)
        raise
    shutil.rmtree(old)


def place(part: Path, path: Path) -> None:
    """Move ``part`` to ``path``, where nothing may lie: raises FileExistsError, and replaces nothing."""
    if part.is_dir():
        if os.path.lexists(path):
            raise FileExistsError(path)
        os.rename(part, path)  # onto a folder that has just appeared only where that is empty
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(part, path)
        except BaseException:
            os.unlink(path)
            raise
    else:
        os.unlink(part)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is flushed and becomes ``path`` when the block ends well."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path)
        descriptor, name = tempfile.mkstemp(prefix=part_prefix(path), suffix=PART, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            replace(Path(name), path)
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
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path)
        part = Path(tempfile.mkdtemp(prefix=part_prefix(path), suffix=PART, dir=path.parent))
        try:
            yield part
            part.chmod(0o755)
            replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def part_prefix(path: Path) -> str:
    """How the name of a part of ``path`` begins; no other output's parts begin like it."""
    return f".{path.name}.mbert-"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep_parts(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it."""
    for part in path.parent.glob(f"{glob.escape(part_prefix(path))}*{PART}"):
        remove(part)
