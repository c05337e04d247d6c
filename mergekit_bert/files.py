"""Files on disk: atomic writes, refusal to overwrite, fingerprints, and the one strict safetensors container.

Only this module opens weight files. It knows nothing of adapters: what the tensors mean is for
:mod:`mergekit_bert.adapters.file` and :mod:`mergekit_bert.composing.file`.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: a killed process leaves the old file or none, never half of one."""
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


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


def tensor_bytes(tensors: Mapping[str, Any], metadata: Json) -> bytes:
    """Torch ``tensors`` and ``metadata`` in the safetensors format; equal inputs give equal bytes."""
    import torch
    from safetensors.torch import save

    # Copies, since safetensors refuses tensors that share memory (one head under two names, say).
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # Inside the one key: the container writes several in an order of chance.
    data: bytes = save(own, metadata={METADATA_KEY: canonical_json({**metadata, _CHECKSUM: _checksum(own)})})
    return data


def _checksum(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Json) -> None:
    """Write ``tensors`` and ``metadata`` as one safetensors file, atomically; OutputError for a value not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OutputError(
                str(path), f"tensor {name!r} would hold NaN or infinity", "finite values", "use smaller weights"
            )
    write_atomic(path, tensor_bytes(tensors, metadata))


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
