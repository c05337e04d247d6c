"""The adapter file: one self-contained safetensors file, written deterministically and read strictly.

Tensors are named ``site.<site>.<tensor>``, ``shift.<parameter>`` and ``head.<tensor>``, those of extras
``extra.<name>.<tensor>``, those of statistics ``<statistic>.<site>.<tensor>``; the metadata describes them. Factors
that are rows of the orthogonal basis are stored as row numbers and computed again on reading.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_bert.adapters.adapter import FORMAT, Adapter
from mergekit_bert.adapters.family import FAMILIES, Family, Size
from mergekit_bert.adapters.patch import REWRITE
from mergekit_bert.adapters.record import AdapterRecord
from mergekit_bert.adapters.statistics import STATISTICS, Statistic
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import MbertError, ModelFileError
from mergekit_bert.schema import Shape, validate
from mergekit_bert.tensorfile import read_tensors, write_tensors

_MOST_REBUILT = 64
"""Limit of the rebuilt values of basis rows, relative to the stored values."""
_MOST_DENSE, _MOST_EXPANDED = 2**28, 4096
"""Limits of the values of all sites made dense: enough for BERT-large; beyond that, relative to the stored values."""


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write ``adapter``; the same adapter gives the same bytes."""
    write_tensors(path, *adapter.contents())


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file; raises ModelFileError for anything that is not exactly one."""
    tensors, metadata = read_tensors(path, old=True)
    kind = check_format(str(path), metadata)
    if kind != "adapter":
        raise ModelFileError(str(path), f"a file of kind {kind!r}", "an adapter", "give the adapters it was made from")
    if set(metadata) != {"format", "kind", kind}:
        raise ModelFileError(str(path), f"metadata keys {', '.join(metadata)}", f"format, kind and {kind}", REWRITE)
    with strict(str(path)):
        return unpack(str(path), tensors, metadata["adapter"])


class strict:  # noqa: N801 (reads as a statement)
    """Turn errors caused by broken metadata into a ModelFileError that names the file."""

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
                self.where, f"broken metadata ({told})", "metadata as mbert writes it", REWRITE
            ) from error


def check_format(where: str, metadata: Mapping[str, Any]) -> str:
    """The file's kind; raises ModelFileError for another format version."""
    version = metadata.get("format")
    if type(version) is not int or version not in (1, FORMAT):
        raise ModelFileError(
            where, f"format version {version!r}", f"version 1 or {FORMAT}", "use the mbert that wrote it"
        )
    return str(metadata.get("kind"))


def unpack(where: str, tensors: Mapping[str, Tensor], value: Any) -> Adapter:
    """The inverse of ``Adapter.pack``; every field, name and shape is checked first."""
    record = validate(AdapterRecord, value)
    family, basis = FAMILIES.get(record.type), record.basis
    rebuilt = family.frozen(basis)
    if basis and not rebuilt:
        raise ValueError(f"basis rows, which {family.name} does not use")
    shapes = _shapes(family, record)
    expected = {
        f"site.{site}.{name}": shape
        for site in record.sites
        for name, shape in shapes[site].items()
        if name not in rebuilt
    }
    expected |= {f"shift.{name}": tuple(shape) for name, shape in record.shifts.items()}
    expected |= {f"head.{name}": tuple(shape) for name, shape in record.head.items()}
    expected |= extra_shapes(family, record.config, record.extras)
    for statistic, sites in record.statistics.items():
        for site, told in sites.items():
            measured = STATISTICS[statistic].shapes(*told.shape)
            expected |= {f"{statistic}.{site}.{name}": shape for name, shape in measured.items()}
    if record.extras.keys() != {one.name for one in family.extras}:
        raise ValueError(f"extras {', '.join(record.extras) or 'none'}, where the type is {family.name}")
    check_tensors(where, tensors, expected)
    check_dense(where, record.sites.values(), tensors)
    _check_rebuilt(where, tensors, record)
    by_site: dict[str, dict[str, Tensor]] = {site: {} for site in record.sites}
    for site, size in record.sites.items():
        for name, shape in shapes[site].items():
            built = basis.matrix(site, size[1]) if basis and name in rebuilt else tensors[f"site.{site}.{name}"]
            if tuple(built.shape) != shape:
                raise ModelFileError(where, f"{len(built)} basis rows", f"{shape[0]}, the rank", REWRITE)
            by_site[site][name] = built
    return Adapter(
        type=family.name,
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
        extras=unpack_extras("", record.extras, tensors),
    )


def extra_shapes(family: Family, config: Any, sizes: Mapping[str, Shape]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of extras of these sizes; raises ValueError for one that the family lacks."""
    known = {one.name: one for one in family.extras}
    if unknown := sorted(sizes.keys() - known.keys()):
        raise ValueError(f"an extra {unknown[0]!r}, which {family.name} does not have")
    return {
        f"extra.{name}.{key}": shape
        for name, size in sizes.items()
        for key, shape in known[name].shapes(config, tuple(size)).items()
    }


def unpack_extras(prefix: str, names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The extras called ``names``, from checked tensors whose names begin with ``prefix``."""
    found = {name: f"{prefix}extra.{name}." for name in names}
    return {
        name: {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        for name, start in found.items()
    }


def _shapes(family: Family, record: AdapterRecord) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of every site; raises ValueError for sites of a family without any."""
    if family.sites is None and record.sites:
        raise ValueError(f"sites, which {family.name} does not have")
    return {
        site: family.sites.shapes(record.config.at(site), size) for site, size in record.sites.items() if family.sites
    }


def _check_rebuilt(where: str, tensors: Mapping[str, Tensor], record: AdapterRecord) -> None:
    """Raise ModelFileError if the rebuilt basis rows would take far more memory than the file."""
    if record.basis is None:
        return
    stored = sum(tensor.numel() for tensor in tensors.values())
    rebuilt = sum(record.basis.count * in_features for _, in_features in record.sites.values())
    if rebuilt > _MOST_REBUILT * stored:
        raise ModelFileError(
            where,
            f"{rebuilt:,} values of basis rows to {stored:,} in the file",
            "sites as wide as an encoder's",
            REWRITE,
        )


def check_dense(where: str, sites: Iterable[Size], tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelFileError if the sites, made dense, would take far more memory than the file."""
    stored = sum(tensor.numel() for tensor in tensors.values())
    dense = sum(math.prod(size) for size in sites)
    if dense > max(_MOST_DENSE, _MOST_EXPANDED * stored):
        raise ModelFileError(
            where, f"sites of {dense:,} values to {stored:,} in the file", "sites as wide as an encoder's", REWRITE
        )


def _unpack_statistics(tensors: Mapping[str, Tensor], record: AdapterRecord) -> dict[str, dict[str, Statistic]]:
    """The statistics by name and site; raises ValueError unless they fit the sites and cover all of them."""
    statistics: dict[str, dict[str, Statistic]] = {}
    for statistic, sites in record.statistics.items():
        statistics[statistic] = {}
        for site, recorded in sites.items():
            names = STATISTICS[statistic].shapes(0, 0)
            values = {name: tensors[f"{statistic}.{site}.{name}"] for name in names}
            measured = STATISTICS[statistic](**values, count=recorded.count, lost=recorded.lost)
            if not measured.fits(record.sites.get(site)):
                raise ValueError(f"{statistic} of {site} does not fit the site")
            statistics[statistic][site] = measured
        for site in record.sites:
            if site not in sites and not of_the_head(site):
                raise ValueError(f"no {statistic} of {site}")
    return statistics


def check_tensors(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless the file contains exactly the expected tensors, in float32."""
    for name in sorted(set(expected) - set(tensors)):
        raise ModelFileError(where, f"tensor {name!r} is missing", f"{len(expected)} tensors", REWRITE)
    for name in sorted(set(tensors) - set(expected)):
        raise ModelFileError(where, f"an extra tensor {name!r}", f"{len(expected)} tensors", REWRITE)
    for name, shape in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or str(found.dtype) != "torch.float32":
            raise ModelFileError(
                where, f"tensor {name!r} is {tuple(found.shape)} {found.dtype}", f"{shape} torch.float32", REWRITE
            )
