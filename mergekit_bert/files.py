"""Files on disk: atomic writes, refusal to overwrite, fingerprints, and the one strict safetensors container.

Only this module opens weight files. It knows nothing of adapters: what the tensors mean is for
:mod:`mergekit_bert.adapters.file` and :mod:`mergekit_bert.composing.file`.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mergekit_bert.errors import ModelFileError, OutputError

Json = Any
METADATA_KEY = "mbert"
_CHECKSUM = "sha256"
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
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
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
    with _atomic_file(path) as file:
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


def tensor_file_sha256(tensors: Mapping[str, Any], metadata: Json) -> str:
    """SHA-256 (hex) of the file that :func:`write_tensors` writes, without writing it."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors, metadata):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, Any], metadata: Json) -> Iterator[bytes | memoryview]:
    """Torch ``tensors`` and ``metadata`` as a safetensors file, piece by piece; equal inputs give equal bytes."""
    # Inside the one key: several would be several orders.
    whole = {METADATA_KEY: canonical_json({**metadata, _CHECKSUM: _checksum(tensors)})}
    described = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, order = safetensors_header(described, whole)
    yield header
    for name in order:
        yield _bytes_of(tensors[name])


_DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "int16": ("I16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int32": ("I32", 4),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "int64": ("I64", 8),
}
"""Torch dtype -> (name in the format, bytes), in the order of the format's own list, which sorts the tensors."""


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The header of a safetensors file of tensors (torch dtype, shape), and the order in which their bytes follow."""
    rank = {name: place for place, name in enumerate(_DTYPES)}
    kinds = {name: dtype.removeprefix("torch.") for name, (dtype, _) in tensors.items()}
    order = sorted(tensors, key=lambda name: (-rank[kinds[name]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        told, size = _DTYPES[kinds[name]]
        shape = tensors[name][1]
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": told, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes_of(tensor: Any) -> memoryview:
    import torch

    flat: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def _checksum(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Json) -> None:
    """Write ``tensors`` and ``metadata`` as one safetensors file, atomically; OutputError for a value not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OutputError(
                str(path), f"tensor {name!r} would hold NaN or infinity", "finite values", "use smaller weights"
            )
    with _atomic_file(path) as file:
        for piece in _pieces(tensors, metadata):
            file.write(piece)


def read_tensors(path: Path) -> tuple[dict[str, Any], Json]:
    """Read what :func:`write_tensors` wrote: CPU torch tensors and the metadata.

    Raises :class:`ModelFileError` for a file that is missing, cut short, damaged, foreign, or not finite.
    """
    import torch
    from safetensors import safe_open

    remedy = "write the file again, or name another"
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no such file"
        raise ModelFileError(str(path), found, "a .safetensors file written by mbert", "check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(
            str(path), f"not readable as safetensors ({error})", "a whole safetensors file", remedy
        ) from error
    if METADATA_KEY not in header:
        raise ModelFileError(
            str(path),
            f"a foreign header (metadata keys: {', '.join(sorted(header)) or 'none'})",
            f"the metadata key {METADATA_KEY!r}",
            "give a file written by mbert",
        )
    try:
        metadata = json.loads(header[METADATA_KEY])
        canonical_json(metadata)  # Python reads NaN and infinity, which are not JSON
    except (ValueError, RecursionError) as error:
        raise ModelFileError(str(path), f"broken metadata ({error})", "JSON", remedy) from error
    if isinstance(metadata, dict) and metadata.pop(_CHECKSUM, None) != _checksum(tensors):
        raise ModelFileError(str(path), "values that do not fit their checksum", "the values as written", remedy)
    for name, tensor in tensors.items():
        wide = tensor.is_floating_point() and tensor.element_size() > 1  # torch cannot ask its 8-bit types
        if wide and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(str(path), f"tensor {name!r} holds NaN or infinity", "finite values", remedy)
    return tensors, metadata
