"""Adapters in memory: the result of training for one task."""

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
"""The format version of all model files. Format 1, whose checksum leaves out the metadata, stays readable."""
_STATISTICS, _EXTRAS = "statistics", "extras"
"""Optional keys of an adapter's record."""
_TOLD = ("type", "config", "task", "basis", "training", "scores", "max_length", "head")
"""Keys of the record that :meth:`Adapter.described` includes."""


@dataclass(frozen=True, repr=False)
class Adapter(Patched, AdapterMethods):
    """A trained adapter.

    ``type`` is the name of its family. ``sites`` maps a site to its size, ``tensors`` a site to the family's tensors.
    ``shifts`` are bias and norm updates by parameter, ``extras`` tensors that are added to the encoder. ``training`` is
    provenance (examples, epochs, seed, data fingerprint, versions …), ``scores`` the scores on the rows held out from
    train. ``statistics`` are those for data-driven merges, by statistic and site. ``weights`` are the base's weights by
    parameter, for families whose Deltas depend on them; they are not stored in the file, see :meth:`on`.
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
        size = mebibytes(sum(tensor.nbytes for group in tensors for tensor in group.values()))
        rank = f" of rank {self.config.rank}" if self.config.rank else ""
        sites = f"{len(self.sites)} sites"
        return summary("Adapter", self.tasks, f"{self.type}{rank}", f"base {self.base.name!r}", sites, size)

    @property
    def name(self) -> str:
        """The name of its task."""
        return self.task.name

    @property
    def family(self) -> Family:
        """The family named by ``type``."""
        return FAMILIES.get(self.type)

    @property
    def needs_base(self) -> bool:
        """Whether its Deltas cannot be computed before it is put :meth:`on` its base."""
        return self.family.needs_weight and self.weights is None

    def on(self, encoder: Encoder) -> "Adapter":
        """The same adapter with ``encoder`` as its base (the caller checks it); weights are read on demand."""
        return dataclasses.replace(self, weights=encoder.weights) if self.family.needs_weight else self

    def deltas(self) -> dict[str, Delta]:
        """The Delta of every site, computed in float32 or wider.

        Raises CompositionError if the family needs the base's weights and the adapter is not on its base.
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
                f"a {self.type} adapter without its base, although its changes depend on the base's weights",
                f"the base {self.base.name!r}",
                "put it on its base: adapter.on(load_encoder(base))",
            )
        weight, size = self.weights.get(f"{site}.weight"), self.sites[site]
        if weight is None or tuple(weight.shape) != size:
            shape = "nothing there" if weight is None else f"{tuple(weight.shape)}"
            raise CompositionError(
                f"adapter {self.name!r}", f"site {site!r} of shape {size}", shape, "give the base it was trained on"
            )
        return weight.detach().cpu().float()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Its task, in a tuple."""
        return (self.task,)

    def own_part(self, task: str) -> Part:
        """All its parameters, which are specific to its task."""
        return Part(self.task, self.max_length, self.deltas(), self.shifts, self.head, self.extras)

    def trainable(self) -> int:
        """The number of trained parameters, including the head and the stored tensors of extras."""
        frozen = self.family.frozen(self.config.basis != "random")
        sites = [tensor for one in self.tensors.values() for name, tensor in one.items() if name not in frozen]
        extras = [tensor for own in self.extras.values() for tensor in own.values()]
        return sum(tensor.numel() for tensor in [*sites, *self.shifts.values(), *extras, *self.head.values()])

    def role(self) -> str:
        """Its name in tables."""
        return "probe" if self.family.head_alone else "adapter"

    def as_adapter(self, task: str) -> "Adapter":
        """The adapter of ``task``: itself."""
        return self

    def places(self, folder: Path) -> dict[str, Path]:
        """The path of its PEFT folder: ``folder``."""
        return {self.name: folder}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors by their names in a file, and its record."""
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
        """The entries of its statistics in the record."""
        return {
            name: {
                site: {"shape": list(statistic.shape), "count": statistic.count, "lost": statistic.lost}
                for site, statistic in by_site.items()
            }
            for name, by_site in self.statistics.items()
        }

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata of its file."""
        tensors, record = self.pack()
        return tensors, {"format": FORMAT, "kind": self.kind, self.kind: record}

    def sha256(self) -> str:
        """SHA-256 (hex) of the adapter: that of its file, also for an adapter in memory."""
        return tensor_file_sha256(*self.contents())

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the adapter of ``task``: its own."""
        return self.sha256()

    def provenance(self) -> dict[str, Any]:
        """The provenance in its record, and the SHA-256 of its file."""
        record = self.pack()[1]
        kept = {
            key: value for key, value in record.items() if key not in ("sites", "shifts", "base", _EXTRAS, _STATISTICS)
        }
        return kept | {"sha256": self.sha256()}

    def origin(self, task: str) -> dict[str, Any]:
        """Provenance of the weights for ``task``."""
        return {**self.provenance(), "method": self.kind}

    def described(self) -> dict[str, Any]:
        """Description of the model as JSON, without base and role."""
        return {
            "parts": {self.name: self.described_part()},
            **self.described_changes(),
            "statistics": self._statistics(),
            "trainable": self.trainable(),
        }

    def described_part(self) -> dict[str, Any]:
        """Description of its configuration and training as JSON."""
        record = self.pack()[1]
        return {key: record[key] for key in _TOLD}

    def described_changes(self) -> dict[str, Any]:
        """Description of its changes as JSON; without norms for Deltas that cannot be computed without the base."""
        if self.needs_base:
            sites = {site: {"size": list(size), "rank": None, "norm": None} for site, size in self.sites.items()}
            return {**Patch({}, self.shifts, self.extras).described(), "sites": sites}
        return Patch(self.deltas(), self.shifts, self.extras).described()


def sizes_of(extras: Extras) -> dict[str, list[int]]:
    """The entries of extras in a record: the size of each, which determines the shapes of its tensors."""
    return {name: list(extra_of(name).size_of(shapes_of(own))) for name, own in extras.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
