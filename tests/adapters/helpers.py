"""Random adapters as training would leave them, and what makes two of them equal."""

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import LowRankOptions
from mergekit_bert.adapters.extra import Extra
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.encoder.sites import find_sites
from mergekit_bert.files import canonical_json
from mergekit_bert.hardware import generator
from mergekit_bert.tensorfile import METADATA_KEY, _container, _pieces, _values_sha256, read_tensors

quick = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_adapter(
    encoder: Encoder,
    task: str | Task = "sst",
    *,
    seed: int = 0,
    kind: str = "lora",
    rank: int = 3,
    start: int = 0,
    examples: int = 100,
    spread: float = 0.3,
    **options: Any,
) -> Adapter:
    """An adapter of ``kind`` with random tensors, shifts and head; ``options`` that it does not have are left out.

    With the orthogonal basis it holds the rows from ``start`` on.
    """
    record, found = FAMILIES.get(kind), get_task(task)
    own = {one.name for one in dataclasses.fields(record.options)}
    given = {name: one for name, one in {"rank": rank, "alpha": 4.0, **options}.items() if name in own}
    config = record.options(**given)
    source = generator(seed, 99)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return spread * torch.randn(shape, generator=source)

    def size_of(value: Tensor) -> Tensor | float:
        """What its noise is in proportion to: a vector of norms, which are small and far from zero, to itself."""
        return value if value.dim() == 1 else 1.0

    sites = find_sites(encoder, config.targets) if record.sites else {}
    basis = BasisRows(0, start, rank) if config.basis == "orthogonal" else None
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for site, size in sites.items():
        rows = basis.matrix(site, size[1]) if basis else None
        assert record.sites is not None
        made = record.sites.init(
            config.at(site), size, rows, partial(encoder.weights.__getitem__, f"{site}.weight"), source
        )
        frozen = record.frozen(basis)
        tensors[site] = {
            name: value if name in frozen else value + size_of(value) * noise(tuple(value.shape))
            for name, value in made.items()
        }
    parameters = dict(encoder.model.named_parameters())
    shifted = record.shifted(config, encoder.model)
    return Adapter(
        type=record.name,
        config=config,
        task=found,
        base=Base.of(encoder),
        max_length=encoder.max_length,
        sites=sites,
        tensors=tensors,
        shifts={name: noise(tuple(parameters[name].shape)) for name in shifted},
        head={name: noise(shape) for name, shape in head_shapes(encoder.config, found).items()},
        basis=basis,
        training={"examples": examples},
        scores={"held_out": 0.5},
        extras={extra.name: _random_extra(extra, config, encoder, source, spread) for extra in record.extras},
    ).on(encoder)


def _random_extra(
    extra: Extra, options: Any, encoder: Encoder, source: torch.Generator, spread: float
) -> dict[str, Tensor]:
    """Its tensors somewhat off where they begin."""
    start = extra.kept(extra.size(encoder), extra.init(options, encoder, source))
    return {name: value + spread * torch.randn(value.shape, generator=source) for name, value in start.items()}


def same_adapter(one: Adapter, two: Adapter) -> bool:
    """Whether two adapters are equal bit for bit, the factors that no file stores included."""
    (tensors, record), (others, other) = one.pack(), two.pack()
    return (
        record == other
        and same_tensors(tensors, others)
        and one.tensors.keys() == two.tensors.keys()
        and all(same_tensors(one.tensors[site], two.tensors[site]) for site in one.tensors)
    )


def same_tensors(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether names and values are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def dense64(adapter: Adapter) -> dict[str, Tensor]:
    """The Deltas of a LoRA from its definition, in float64."""
    assert isinstance(adapter.config, LowRankOptions)
    scale = adapter.config.alpha / (adapter.config.rank**0.5 if adapter.config.rank_stabilized else adapter.config.rank)
    return {site: scale * (one["B"].double() @ one["A"].double()) for site, one in adapter.tensors.items()}


def renamed(adapter: Adapter, name: str) -> Adapter:
    """The same adapter for a task of another name."""
    return dataclasses.replace(adapter, task=dataclasses.replace(adapter.task, name=name))


def one_line(error: Exception) -> bool:
    """Check that the message is one line; true if it is."""
    assert "\n" not in str(error), str(error)
    return True


def try_odd_values(*files: Path) -> None:
    """Put odd values everywhere in the metadata, in a process without the type checker of the tests."""
    script = Path(__file__).with_name("odd_values.py")
    ran = subprocess.run([sys.executable, str(script), *map(str, files)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file, taken apart by hand."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_raw(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """The inverse of :func:`read_raw`."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_signed(path: Path, tensors: Mapping[str, Tensor], metadata: Any) -> None:
    """A model file as a hostile author can make it: whatever the metadata says, its digest is right.

    Metadata that is no JSON cannot have one, and is written as Python spells it.
    """
    try:
        path.write_bytes(b"".join(_pieces(tensors, metadata)))
    except (TypeError, ValueError):
        path.write_bytes(b"".join(_container(tensors, {METADATA_KEY: json.dumps(metadata)})))


def edit_metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of a model file's metadata, with the digest that belongs to it."""

    def edit(path: Path) -> None:
        found, metadata = read_tensors(path, old=True)
        change(metadata)
        write_signed(path, found, metadata)

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of a model file's tensors, with the digest that belongs to it."""

    def edit(path: Path) -> None:
        found, metadata = read_tensors(path)
        change(found)
        write_signed(path, found, metadata)

    return edit


def as_format_1(path: Path) -> None:
    """Turn a model file into one of format 1: the same, but for a checksum of the values alone."""
    found, metadata = read_tensors(path)
    metadata |= {"format": 1, "sha256": _values_sha256(found)}
    path.write_bytes(b"".join(_container(found, {METADATA_KEY: canonical_json(metadata)})))
