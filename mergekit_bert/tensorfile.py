"""The one strict safetensors container: written deterministically, read whole or a tensor at a time.

Only this module opens weight files. It knows nothing of adapters: what the tensors mean is for
:mod:`mergekit_bert.adapters.file` and :mod:`mergekit_bert.formats.file`.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mergekit_bert.documents import DocumentError, parse_json, read_mapping
from mergekit_bert.errors import ModelFileError, OutputError
from mergekit_bert.files import Json, atomic_file, canonical_json

METADATA_KEY = "mbert"
_DIGEST, _OLD_DIGEST = "digest", "sha256"
"""The keys of the digest over all, and of format 1's over the values alone."""
_MAX_HEADER = 32 * 2**20
LARGEST = 1e18
"""The largest magnitude of a value: its square is still a number in float32."""
NOT_FINITE = f"NaN or values beyond {LARGEST:g}"
_AGAIN = "get or write the file again, or name another"


def tensor_file_sha256(tensors: Mapping[str, Any], metadata: Json) -> str:
    """SHA-256 (hex) of the file that :func:`write_tensors` writes, without writing it."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors, metadata):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, Any], metadata: Json) -> Iterator[bytes | memoryview]:
    """Torch ``tensors`` and ``metadata`` as a safetensors file, piece by piece; equal inputs give equal bytes."""
    # Inside the one key: several would be several orders.
    return _container(tensors, {METADATA_KEY: canonical_json({**metadata, _DIGEST: _digest(tensors, metadata)})})


def _container(tensors: Mapping[str, Any], header: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    described = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, order = safetensors_header(described, header)
    yield start
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


def _digest(tensors: Mapping[str, Any], metadata: Json) -> str:
    """SHA-256 (hex) over the metadata and the tensors' names, types, shapes and values."""
    return hashlib.sha256(f"{canonical_json(metadata)}\n{_values_sha256(tensors)}".encode()).hexdigest()


def _values_sha256(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over names, types, shapes and values: all that files of before the digest are protected by."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def finite(tensor: Any) -> bool:
    """Whether a tensor holds no NaN and nothing beyond ``LARGEST``; one in 8 bits, which torch cannot ask, does."""
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return True
    low, high = map(float, tensor.aminmax())
    return low >= -LARGEST and high <= LARGEST


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Json) -> None:
    """Write ``tensors`` and ``metadata`` as one safetensors file, atomically; OutputError for a value not finite."""
    _write(path, tensors, _pieces(tensors, metadata))


def write_plain_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write ``tensors`` as other libraries write PyTorch's, atomically; OutputError for a value not finite."""
    _write(path, tensors, _container(tensors, {"format": "pt"}))


def _write(path: Path, tensors: Mapping[str, Any], pieces: Iterator[bytes | memoryview]) -> None:
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise OutputError(
                str(path), f"tensor {name!r} would hold {NOT_FINITE}", "finite values", "use smaller weights"
            )
    with atomic_file(path) as file:
        for piece in pieces:
            file.write(piece)


def read_tensors(path: Path, old: bool = False) -> tuple[dict[str, Any], Json]:
    """Read what :func:`write_tensors` wrote: CPU torch tensors and the metadata.

    Every byte counts: the file must be the one that would be written anew. ``old`` admits files of format 1 too, whose
    checksum leaves the metadata out. Raises :class:`ModelFileError` for a file that is missing, cut short, damaged,
    foreign, or not finite.
    """
    header, start = _read_header(path, "a .safetensors file written by mbert")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or set(texts) != {METADATA_KEY} or not isinstance(texts[METADATA_KEY], str):
        found = ", ".join(sorted(texts)) if isinstance(texts, dict) else type(texts).__name__
        raise ModelFileError(
            str(path),
            f"a foreign header (metadata keys: {found or 'none'})",
            f"the metadata key {METADATA_KEY!r} alone",
            "give a file written by mbert",
        )
    try:
        metadata = parse_json(texts[METADATA_KEY])
    except DocumentError as error:
        raise ModelFileError(str(path), f"broken metadata ({error})", "JSON", _AGAIN) from error
    if not isinstance(metadata, dict):
        raise ModelFileError(str(path), f"metadata that is a {type(metadata).__name__}", "an object", _AGAIN)
    tensors = _values(path)
    described = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if canonical_json(metadata) != texts[METADATA_KEY] or safetensors_header(described, texts)[0] != start:
        raise ModelFileError(str(path), "a header in another form", "the header as mbert writes it", _AGAIN)
    _check_digest(path, tensors, metadata, old)
    _check_finite(path, tensors)
    return tensors, metadata


def is_foreign(path: Path) -> bool:
    """Whether ``path`` is a whole safetensors file of another program; what is broken is nobody's."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return METADATA_KEY not in (file.metadata() or {})
    except SafetensorError:
        return False


def _check_digest(path: Path, tensors: Mapping[str, Any], metadata: dict[str, Json], old: bool) -> None:
    """Raise ModelFileError unless the file is what it was when it was written; takes the digest out of ``metadata``."""
    version = metadata.get("format")
    if old and type(version) is int and version == 1:
        good = metadata.pop(_OLD_DIGEST, None) == _values_sha256(tensors)
    else:
        good = metadata.pop(_DIGEST, None) == _digest(tensors, metadata)
    if not good:
        raise ModelFileError(
            str(path), "contents that do not fit their checksum", "the file as it was written", "get the file again"
        )


def read_metadata(path: Path) -> Json:
    """The metadata of a file that :func:`write_tensors` wrote, unchecked and without its tensors; None if foreign.

    For looking at many files, not for believing one. Raises :class:`ModelFileError` for what is no such container.
    """
    texts = _read_header(path, "a .safetensors file")[0].get("__metadata__")
    if not isinstance(texts, dict) or not isinstance(texts.get(METADATA_KEY), str):
        return None
    try:
        return parse_json(texts[METADATA_KEY])
    except DocumentError as error:
        raise ModelFileError(str(path), f"broken metadata ({error})", "JSON", _AGAIN) from error


def read_plain_tensors(path: Path) -> dict[str, Any]:
    """CPU torch tensors of a safetensors file that any library wrote, as they are.

    Raises :class:`ModelFileError` for a file that is missing, cut short, damaged, or not finite.
    """
    _read_header(path, "a .safetensors file")
    tensors = _values(path)
    _check_finite(path, tensors)
    return tensors


def _read_header(path: Path, expected: str) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, bounded and with each key once: its value, and its bytes."""
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
        raise ModelFileError(str(path), found, expected, "check the path")
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or size > min(_MAX_HEADER, path.stat().st_size - 8):
                raise _unreadable(path, f"a header of {size:,} bytes" if len(start) == 8 else "too short")
            header = file.read(size)
        found = parse_json(header)
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error).lower()) from error
    except DocumentError as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(found, dict):
        raise _unreadable(path, f"a header that is a {type(found).__name__}")
    return found, start + header


def _unreadable(path: Path, reason: object) -> ModelFileError:
    return ModelFileError(str(path), f"not readable as safetensors ({reason})", "a whole safetensors file", _AGAIN)


def _values(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def _check_finite(path: Path, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ModelFileError(str(path), f"tensor {name!r} holds {NOT_FINITE}", "finite values", _AGAIN)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, Any]):
    """The tensors of a safetensors file, or of all of a folder, each read when it is asked for and kept by nobody.

    ``shapes`` has the shape of each. Raises :class:`ModelFileError` for what is not there or not whole, and on reading
    for values that are not finite.
    """

    def __init__(self, path: Path) -> None:
        """Read names, types and shapes."""
        self.path = path
        self._places = {name: place for file in _weight_files(path) for name, place in _places(file).items()}
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def __getitem__(self, name: str) -> Any:
        """The CPU torch tensor, read now."""
        import torch

        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=getattr(torch, place.dtype))
        room = _bytes_of(tensor)
        try:
            with place.file.open("rb") as file:
                file.seek(place.start)
                if file.readinto(room) != len(room):
                    raise ModelFileError(str(place.file), "it was cut short", "a whole safetensors file", _AGAIN)
        except OSError as error:
            raise ModelFileError(str(place.file), str(error.strerror).lower(), "a readable file", _AGAIN) from error
        if not finite(tensor):
            raise ModelFileError(
                str(place.file), f"tensor {name!r} holds {NOT_FINITE}", "finite values", "give another checkpoint"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads nothing."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the files."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)


def _weight_files(path: Path) -> list[Path]:
    """The file itself, a folder's ``model.safetensors``, or, where there is none, the shards that its index names."""
    if not path.is_dir():
        return [path]
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = read_mapping(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise DocumentError("no weight_map of names of files")
        files = sorted(set(names.values()))
        if not files or any(Path(name).name != name or name == ".." for name in files):
            raise DocumentError("names of files elsewhere, or none")
    except (OSError, DocumentError) as error:
        raise ModelFileError(str(index), f"broken ({error})", "an index of shards", "write the folder again") from error
    return [path / name for name in files]


def _places(path: Path) -> dict[str, _Place]:
    """Where the tensors of a safetensors file lie."""
    from safetensors import safe_open

    header, start = _read_header(path, "a .safetensors file")
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # it refuses a header that does not fit the file
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    kinds = {told: dtype for dtype, (told, _) in _DTYPES.items()}
    odd = {entry["dtype"] for entry in header.values()} - set(kinds)
    if odd:
        raise ModelFileError(str(path), f"tensors of type {min(odd)}", f"types among {', '.join(kinds)}", _AGAIN)
    return {
        name: _Place(path, len(start) + entry["data_offsets"][0], kinds[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }


@contextlib.contextmanager
def tensors_in_any_order(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Callable[[str, Any], None]]:
    """Write a plain safetensors file of float32 tensors that come one by one: yields ``put(name, tensor)``.

    Where each tensor goes is known from the shapes, so that none is kept but the one that is being written, in a
    thread of its own; it must not be changed after it was put. At the end the file is read back, a tensor at a time.
    Raises :class:`OutputError` for a value that is not finite and for a file that reads otherwise.
    """
    described = {name: ("float32", shape) for name, shape in shapes.items()}
    header, order = safetensors_header(described, {"format": "pt"})
    starts, start = {}, len(header)
    for name in order:
        starts[name], start = start, start + 4 * math.prod(shapes[name])
    sums: dict[str, int] = {}
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(file.write, header)

        def write(start: int, tensor: Any) -> int:
            file.seek(start)
            return file.write(_bytes_of(tensor))

        def put(name: str, tensor: Any) -> None:
            if str(tensor.dtype) != "torch.float32" or tuple(tensor.shape) != shapes[name] or name in sums:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, or for the second time")
            if not finite(tensor):
                raise OutputError(
                    str(path), f"tensor {name!r} would hold {NOT_FINITE}", "finite values", "use smaller weights"
                )
            sums[name] = _bit_sum(tensor)
            nonlocal writing
            writing.result()
            writing = writer.submit(write, starts[name], tensor)

        yield put
        writing.result()
    if sums.keys() != shapes.keys():
        raise ValueError(f"never put: {', '.join(sorted(shapes.keys() - sums.keys()))}")
    written = StoredTensors(path)
    if written.shapes != shapes or any(_bit_sum(written[name]) != total for name, total in sums.items()):
        raise OutputError(str(path), "what was read back differs", "the same tensors", "check the disk")


def _bit_sum(tensor: Any) -> int:
    """The sum of a float32 tensor's words, modulo 2³²: quick, and exact whatever their order."""
    import torch

    return int(tensor.cpu().contiguous().view(torch.int32).sum(dtype=torch.int32))
