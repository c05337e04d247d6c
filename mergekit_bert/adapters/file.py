"""The adapter file: one safetensors file, whole in itself, written deterministically and read strictly.

Tensors are named ``site.<site>.<tensor>``, ``shift.<parameter>`` and ``head.<tensor>``, those of statistics
``<kind>.<site>.<tensor>``; the metadata says what they mean, of statistics only where there are some. Factors that are
rows of the orthogonal basis are stored as row numbers and rebuilt on reading.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_bert.adapters.adapter import FAMILIES, Adapter, Base, Part, Size
from mergekit_bert.adapters.record import AdapterRecord
from mergekit_bert.adapters.statistics import STATISTICS, Statistic
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.head import head_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import linear_layers, of_the_head
from mergekit_bert.errors import MbertError, ModelFileError
from mergekit_bert.schema import validate
from mergekit_bert.tensorfile import read_tensors, tensor_file_sha256, write_tensors

FORMAT = 2
"""Format 1 differs in its checksum alone, which leaves the metadata out; it stays readable."""
_STATISTICS = "statistics"
"""A key that is there only in the record of an adapter that has some."""
_MOST_REBUILT = 64
_MOST_DENSE, _MOST_EXPANDED = 2**28, 4096
"""Values of all sites made dense: what any encoder up to BERT-large's size has, and more only with that many stored."""
"""Values of rebuilt factors to each one in the file: a layer is not that much wider than it is high."""
_REWRITE = "write the file again with this version of mbert"


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write ``adapter``; the same adapter gives the same bytes."""
    write_tensors(path, *_contents(adapter))


def adapter_sha256(adapter: Adapter) -> str:
    """SHA-256 (hex) of the file that :func:`write_adapter` writes: the adapter's identity, in memory or on disk."""
    return tensor_file_sha256(*_contents(adapter))


def _contents(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, record = pack(adapter)
    return tensors, {"format": FORMAT, "kind": "adapter", "adapter": record}


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file; raises ModelFileError for anything that is not exactly one."""
    tensors, metadata = read_tensors(path, old=True)
    kind = check_format(str(path), metadata)
    if kind != "adapter":
        raise ModelFileError(str(path), f"a file of kind {kind!r}", "an adapter", "give the adapters it was made from")
    if set(metadata) != {"format", "kind", kind}:
        raise ModelFileError(str(path), f"metadata keys {', '.join(metadata)}", f"format, kind and {kind}", _REWRITE)
    with strict(str(path)):
        return unpack(str(path), tensors, metadata["adapter"])


class strict:  # noqa: N801 (reads as a statement)
    """Turn what broken metadata raises into a ModelFileError that names the file."""

    def __init__(self, where: str) -> None:
        """``where`` is the file."""
        self.where = where

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Translate the error."""
        if isinstance(error, ModelFileError):
            return
        if isinstance(error, LookupError | TypeError | ValueError | ArithmeticError | AttributeError | MbertError):
            told = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ModelFileError(
                self.where, f"broken metadata ({told})", "metadata as mbert writes it", _REWRITE
            ) from error


def check_format(where: str, metadata: Mapping[str, Any]) -> str:
    """The file's kind; raises ModelFileError for another format version."""
    version = metadata.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise ModelFileError(
            where, f"format version {version!r}", f"version 1 or {FORMAT}", "use the mbert that wrote it"
        )
    return str(metadata.get("kind"))


def pack(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record) of an adapter."""
    rebuilt = adapter.family.frozen(adapter.basis)
    tensors = {
        f"site.{site}.{name}": tensor
        for site, values in adapter.tensors.items()
        for name, tensor in values.items()
        if name not in rebuilt
    }
    tensors |= {f"shift.{name}": tensor for name, tensor in adapter.shifts.items()}
    tensors |= {f"head.{name}": tensor for name, tensor in adapter.head.items()}
    record = {
        "type": adapter.type,
        "config": adapter.config.to_json(),
        "task": adapter.task.to_json(),
        "base": dataclasses.asdict(adapter.base),
        "max_length": adapter.max_length,
        "sites": {site: list(size) for site, size in adapter.sites.items()},
        "shifts": {name: list(tensor.shape) for name, tensor in adapter.shifts.items()},
        "head": {name: list(tensor.shape) for name, tensor in adapter.head.items()},
        "basis": adapter.basis.to_json() if adapter.basis else None,
        "training": dict(adapter.training),
        "scores": dict(adapter.scores),
    }
    if adapter.statistics:
        measured, record[_STATISTICS] = _pack_statistics(adapter)
        tensors |= measured
    return tensors, record


def _pack_statistics(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        f"{kind}.{site}.{name}": getattr(one, name)
        for kind, found in adapter.statistics.items()
        for site, one in found.items()
        for name in one.shapes(*one.shape)
    }
    record = {
        kind: {site: {"shape": list(one.shape), "count": one.count, "lost": one.lost} for site, one in found.items()}
        for kind, found in adapter.statistics.items()
    }
    return tensors, record


def provenance(adapter: Adapter) -> dict[str, Any]:
    """The part of an adapter's record that tells where it came from, and the SHA-256 of its file."""
    record = pack(adapter)[1]
    kept = {key: value for key, value in record.items() if key not in ("sites", "shifts", "base", _STATISTICS)}
    return kept | {"sha256": adapter_sha256(adapter)}


def unpack(where: str, tensors: Mapping[str, Tensor], value: Any) -> Adapter:
    """The inverse of :func:`pack`; every field, name and shape is checked before anything is made of it."""
    record = validate(AdapterRecord, value)
    family, basis = FAMILIES.get(record.type), record.basis
    rebuilt = family.frozen(basis)
    if basis and not rebuilt:
        raise ValueError(f"basis rows, which {family.name} takes none of")
    expected = {
        f"site.{site}.{name}": shape
        for site, size in record.sites.items()
        for name, shape in family.shapes(record.config.at(site), size).items()
        if name not in rebuilt
    }
    expected |= {f"shift.{name}": tuple(shape) for name, shape in record.shifts.items()}
    expected |= {f"head.{name}": tuple(shape) for name, shape in record.head.items()}
    for statistic, sites in record.statistics.items():
        for site, told in sites.items():
            shapes = STATISTICS[statistic].shapes(*told.shape)
            expected |= {f"{statistic}.{site}.{name}": shape for name, shape in shapes.items()}
    check_tensors(where, tensors, expected)
    check_dense(where, record.sites.values(), tensors)
    _check_rebuilt(where, tensors, record)
    by_site: dict[str, dict[str, Tensor]] = {site: {} for site in record.sites}
    for site, size in record.sites.items():
        for name, shape in family.shapes(record.config.at(site), size).items():
            built = basis.matrix(site, size[1]) if basis and name in rebuilt else tensors[f"site.{site}.{name}"]
            if tuple(built.shape) != shape:
                raise ModelFileError(where, f"{len(built)} basis rows", f"{shape[0]}, the rank", _REWRITE)
            by_site[site][name] = built
    return Adapter(
        type=record.type,
        config=record.config,
        task=record.task,
        base=record.base,
        max_length=record.max_length,
        sites=record.sites,
        tensors=by_site,
        shifts={name: tensors[f"shift.{name}"] for name in record.shifts},
        head={name: tensors[f"head.{name}"] for name in record.head},
        basis=basis,
        training=record.training.model_dump(exclude_unset=True),
        scores=record.scores,
        statistics=_unpack_statistics(tensors, record),
    )


def _check_rebuilt(where: str, tensors: Mapping[str, Tensor], record: AdapterRecord) -> None:
    """Raise ModelFileError where the factors that no file stores would take far more memory than the file."""
    if record.basis is None:
        return
    stored = sum(tensor.numel() for tensor in tensors.values())
    rebuilt = sum(record.basis.count * in_features for _, in_features in record.sites.values())
    if rebuilt > _MOST_REBUILT * stored:
        raise ModelFileError(
            where,
            f"{rebuilt:,} values of basis rows to {stored:,} in the file",
            "sites as wide as an encoder's",
            _REWRITE,
        )


def check_dense(where: str, sites: Iterable[Size], tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelFileError where the sites, made dense, would take far more memory than the file."""
    stored = sum(tensor.numel() for tensor in tensors.values())
    dense = sum(math.prod(size) for size in sites)
    if dense > max(_MOST_DENSE, _MOST_EXPANDED * stored):
        raise ModelFileError(
            where, f"sites of {dense:,} values to {stored:,} in the file", "sites as wide as an encoder's", _REWRITE
        )


def _unpack_statistics(tensors: Mapping[str, Tensor], record: AdapterRecord) -> dict[str, dict[str, Statistic]]:
    """The inverse of :func:`_pack_statistics`; they must fit the adapter's sites and leave none out."""
    measured: dict[str, dict[str, Statistic]] = {}
    for kind, found in record.statistics.items():
        measured[kind] = {}
        for site, told in found.items():
            names = STATISTICS[kind].shapes(0, 0)
            values = {name: tensors[f"{kind}.{site}.{name}"] for name in names}
            one = STATISTICS[kind](**values, count=told.count, lost=told.lost)
            if not one.fits(record.sites.get(site)):
                raise ValueError(f"{kind} of {site} that cannot be")
            measured[kind][site] = one
        for site in record.sites:
            if site not in found and not of_the_head(site):
                raise ValueError(f"no {kind} of {site}")
    return measured


def check_tensors(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless the file holds exactly the expected tensors, in float32."""
    for name in sorted(set(expected) - set(tensors)):
        raise ModelFileError(where, f"tensor {name!r} is missing", f"{len(expected)} tensors", _REWRITE)
    for name in sorted(set(tensors) - set(expected)):
        raise ModelFileError(where, f"an extra tensor {name!r}", f"{len(expected)} tensors", _REWRITE)
    for name, shape in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or str(found.dtype) != "torch.float32":
            raise ModelFileError(
                where, f"tensor {name!r} is {tuple(found.shape)} {found.dtype}", f"{shape} torch.float32", _REWRITE
            )


def check_base(where: str, base: Base, encoder: Encoder) -> None:
    """Raise ModelFileError unless ``encoder`` is the base that the file was made for."""
    if base.fingerprint != encoder.fingerprint:
        raise ModelFileError(
            where,
            f"made for base {base.name!r} (weights {base.fingerprint[:12]})",
            f"base {encoder.name!r} (weights {encoder.fingerprint[:12]})",
            "give the `base` it was trained on",
        )
    if base.tokenizer_fingerprint != encoder.tokenizer_fingerprint:
        raise ModelFileError(
            where,
            f"made with another tokenizer ({base.tokenizer_fingerprint[:12]})",
            f"the tokenizer of {encoder.name!r} ({encoder.tokenizer_fingerprint[:12]})",
            "restore the tokenizer it was trained with",
        )


def check_part(where: str, part: Part, encoder: Encoder) -> None:
    """Raise ModelFileError unless the part's sites, shifts and head fit ``encoder``."""
    layers = linear_layers(encoder)
    parameters = {name: tuple(p.shape) for name, p in encoder.model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {f"site {site}": delta.shape for site, delta in part.deltas.items()}
    expected: dict[str, tuple[int, ...]] = {f"site {site}": size for site, size in layers.items()}
    found |= {f"shift {name}": tuple(tensor.shape) for name, tensor in part.shifts.items()}
    expected |= {f"shift {name}": shape for name, shape in parameters.items()}
    head = {f"head {name}": shape for name, shape in head_shapes(encoder.config, part.task, head_of(part.head)).items()}
    found |= {f"head {name}": tuple(tensor.shape) for name, tensor in part.head.items()}
    for name in head:
        if name not in found:
            raise ModelFileError(where, f"no {name}", f"a head of {encoder.config.model_type}", _REWRITE)
    expected |= head
    for name, shape in found.items():
        if expected.get(name) != shape:
            raise ModelFileError(
                where,
                f"{name} has shape {shape}",
                f"{expected.get(name, 'nothing there')}",
                "give the base it was trained on",
            )
