"""Adapters in memory: what training gave one task."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.extra import shapes_of
from mergekit_bert.adapters.family import FAMILIES, Family, Size, Tensors, extra_of
from mergekit_bert.adapters.patch import Extras, Part, Patch
from mergekit_bert.adapters.patched import Patched
from mergekit_bert.adapters.statistics import Statistic
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.model_methods import AdapterMethods, mebibytes, summary
from mergekit_bert.tensorfile import tensor_file_sha256

FORMAT = 2
"""Of all model files. Format 1 differs in its checksum alone, which leaves the metadata out; it stays readable."""
_STATISTICS, _EXTRAS = "statistics", "extras"
"""Keys that are there only in the record of an adapter that has some."""
_TOLD = ("type", "config", "task", "basis", "training", "scores", "max_length", "head")
"""Keys of the record that :meth:`Adapter.described` repeats."""


@dataclass(frozen=True, repr=False)
class Adapter(Patched, AdapterMethods):
    """A trained adapter.

    ``type`` names its family. ``sites`` maps a site to its size, ``tensors`` a site to the family's tensors. ``shifts``
    are changes of biases and LayerNorm parameters, by name, ``extras`` tensors that are new to the encoder.
    ``training`` is provenance (examples, epochs, seed, data fingerprint, versions …), ``scores`` what was measured on
    the rows held out from train. ``statistics`` are what data-driven merges need, by kind and site. ``weights`` are the
    base's, by parameter, for a family whose Deltas need them: they are in no file, see :meth:`on`.
    """

    kind = "adapter"

    type: str
    config: Options
    task: Task
    base: Base
    max_length: int
    sites: Mapping[str, Size]
    tensors: Mapping[str, Tensors]
    shifts: Tensors
    head: Tensors
    basis: BasisRows | None
    training: Mapping[str, Any]
    scores: Mapping[str, float]
    statistics: Mapping[str, Mapping[str, Statistic]] = field(default_factory=dict)
    extras: Extras = field(default_factory=dict)
    weights: Tensors | None = field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        """One line."""
        tensors = (self.shifts, self.head, *self.tensors.values(), *self.extras.values())
        size = mebibytes(sum(tensor.nbytes for found in tensors for tensor in found.values()))
        rank = f" of rank {self.config.rank}" if self.config.rank else ""
        sites = f"{len(self.sites)} sites"
        return summary("Adapter", self.tasks, f"{self.type}{rank}", f"base {self.base.name!r}", sites, size)

    @property
    def name(self) -> str:
        """Adapters are known by their task."""
        return self.task.name

    @property
    def family(self) -> Family:
        """What its ``type`` names."""
        return FAMILIES.get(self.type)

    @property
    def needs_base(self) -> bool:
        """Whether it has no Deltas before it is put :meth:`on` its base."""
        return self.family.needs_weight and self.weights is None

    def on(self, encoder: Encoder) -> "Adapter":
        """The same on ``encoder``, its base (which the caller checks), whose weights are read when they are needed."""
        return dataclasses.replace(self, weights=encoder.weights) if self.family.needs_weight else self

    def deltas(self) -> dict[str, Delta]:
        """The Delta of every site, worked out in float32 or wider whatever its tensors are kept in.

        Raises CompositionError where the family needs the base's weights and the adapter is on none.
        """
        beside = self.family.sites
        if beside is None:
            return {}
        return {
            site: beside.delta(
                {name: _wide(tensor) for name, tensor in tensors.items()},
                self.config.at(site),
                partial(self._weight, site),
            )
            for site, tensors in self.tensors.items()
        }

    def _weight(self, site: str) -> Tensor:
        if self.weights is None:
            raise CompositionError(
                f"adapter {self.name!r}",
                f"a {self.type} adapter by itself, whose changes depend on the base's weights",
                f"the base {self.base.name!r}",
                "put it on its base: adapter.on(load_encoder(base))",
            )
        weight, size = self.weights.get(f"{site}.weight"), self.sites[site]
        if weight is None or tuple(weight.shape) != size:
            found = "nothing there" if weight is None else f"{tuple(weight.shape)}"
            raise CompositionError(
                f"adapter {self.name!r}", f"site {site!r} of shape {size}", found, "give the base it was trained on"
            )
        return weight.detach().cpu().float()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks it answers: its own."""
        return (self.task,)

    def own_part(self, task: str) -> Part:
        """All of it, for ``task``, its own."""
        return Part(self.task, self.max_length, self.deltas(), self.shifts, self.head, self.extras)

    def trainable(self) -> int:
        """How many numbers its training chose, those of the head included, and those that extras keep."""
        frozen = self.family.frozen(self.config.basis != "random")
        sites = [tensor for one in self.tensors.values() for name, tensor in one.items() if name not in frozen]
        extras = [tensor for own in self.extras.values() for tensor in own.values()]
        return sum(tensor.numel() for tensor in [*sites, *self.shifts.values(), *extras, *self.head.values()])

    def role(self) -> str:
        """What it is called in tables."""
        return "probe" if self.family.head_alone else "adapter"

    def as_adapter(self, task: str) -> "Adapter":
        """The adapter that answers ``task``: itself."""
        return self

    def places(self, folder: Path) -> dict[str, Path]:
        """Where its PEFT folder lies: it is ``folder``."""
        return {self.name: folder}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors by the names that they have in a file, and its record."""
        rebuilt = self.family.frozen(self.basis)
        tensors = {
            f"site.{site}.{name}": tensor
            for site, values in self.tensors.items()
            for name, tensor in values.items()
            if name not in rebuilt
        }
        tensors |= {f"shift.{name}": tensor for name, tensor in self.shifts.items()}
        tensors |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        record = {
            "type": self.type,
            "config": self.config.to_json(),
            "task": self.task.to_json(),
            "base": dataclasses.asdict(self.base),
            "max_length": self.max_length,
            "sites": {site: list(size) for site, size in self.sites.items()},
            "shifts": {name: list(tensor.shape) for name, tensor in self.shifts.items()},
            "head": {name: list(tensor.shape) for name, tensor in self.head.items()},
            "basis": self.basis.to_json() if self.basis else None,
            "training": dict(self.training),
            "scores": dict(self.scores),
        }
        if self.extras:
            tensors |= {
                f"extra.{name}.{key}": tensor for name, own in self.extras.items() for key, tensor in own.items()
            }
            record[_EXTRAS] = sizes_of(self.extras)
        if self.statistics:
            tensors |= {
                f"{kind}.{site}.{name}": getattr(one, name)
                for kind, found in self.statistics.items()
                for site, one in found.items()
                for name in one.shapes(*one.shape)
            }
            record[_STATISTICS] = self._statistics()
        return tensors, record

    def _statistics(self) -> dict[str, Any]:
        """What the record says of its statistics."""
        return {
            kind: {
                site: {"shape": list(one.shape), "count": one.count, "lost": one.lost} for site, one in found.items()
            }
            for kind, found in self.statistics.items()
        }

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata of its file."""
        tensors, record = self.pack()
        return tensors, {"format": FORMAT, "kind": self.kind, self.kind: record}

    def sha256(self) -> str:
        """SHA-256 (hex) of the file that it is written to: its identity, in memory or on disk."""
        return tensor_file_sha256(*self.contents())

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the adapter that answers ``task``: its own."""
        return self.sha256()

    def provenance(self) -> dict[str, Any]:
        """The part of its record that tells where it came from, and the SHA-256 of its file."""
        record = self.pack()[1]
        kept = {
            key: value for key, value in record.items() if key not in ("sites", "shifts", "base", _EXTRAS, _STATISTICS)
        }
        return kept | {"sha256": self.sha256()}

    def origin(self, task: str) -> dict[str, Any]:
        """How the weights that answer ``task`` came about."""
        return {**self.provenance(), "method": self.kind}

    def described(self) -> dict[str, Any]:
        """What there is to tell of it, as JSON, apart from its base and its role."""
        return {
            "parts": {self.name: self.described_part()},
            **self.described_changes(),
            "statistics": self._statistics(),
            "trainable": self.trainable(),
        }

    def described_part(self) -> dict[str, Any]:
        """What there is to tell of its training, as JSON."""
        record = self.pack()[1]
        return {key: record[key] for key in _TOLD}

    def described_changes(self) -> dict[str, Any]:
        """What it changes; no norms of Deltas that the file alone, without its base, does not determine."""
        if self.needs_base:
            sites = {site: {"size": list(size), "rank": None, "norm": None} for site, size in self.sites.items()}
            return {**Patch({}, self.shifts, self.extras).described(), "sites": sites}
        return Patch(self.deltas(), self.shifts, self.extras).described()


def sizes_of(extras: Extras) -> dict[str, list[int]]:
    """What a record says of extras: the size of each, from which the shapes of its tensors follow."""
    return {name: list(extra_of(name).size_of(shapes_of(own))) for name, own in extras.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
