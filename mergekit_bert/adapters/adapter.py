"""Adapters in memory: what training gave one task, and what an adapter type is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.statistics import Statistic
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.model_methods import AdapterMethods, mebibytes, summary
from mergekit_bert.registry import Registry
from mergekit_bert.schema import STRICT, BaseName, Sha256

Size = tuple[int, int]
"""(out_features, in_features) of a site."""
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterType:
    """One way of adapting a linear layer.

    ``shapes`` names the tensors of a site; ``init`` makes them (given basis rows for ``A``, or None); ``delta`` is
    the change of the site's weight, differentiable in the tensors. ``lr`` and ``head_lr`` are the peak learning rates
    it needs, where they are not the usual ones. A type without sites is a head alone.
    """

    name: str
    description: str
    source: str
    shapes: Callable[[AdapterConfig, Size], dict[str, tuple[int, ...]]]
    init: Callable[[AdapterConfig, Size, Tensor | None, torch.Generator], dict[str, Tensor]]
    delta: Callable[[Tensors, AdapterConfig], Delta]
    has_sites: bool = True
    lr: float | None = None
    head_lr: float | None = None


TYPES = Registry("mergekit_bert.adapters.types", "adapter type", AdapterType)


@dataclass(frozen=True)
class Base:
    """Which encoder an adapter belongs to: a name for people, fingerprints for certainty."""

    name: BaseName
    fingerprint: Sha256
    tokenizer_fingerprint: Sha256

    __pydantic_config__: ClassVar = STRICT

    @classmethod
    def of(cls, encoder: Encoder) -> "Base":
        """The identity of ``encoder``."""
        return cls(encoder.name, encoder.fingerprint, encoder.tokenizer_fingerprint)


@dataclass(frozen=True)
class Part:
    """What it takes to answer one task: Deltas by site, shifts of other parameters by name, and a head."""

    task: Task
    max_length: int
    deltas: Mapping[str, Delta]
    shifts: Tensors
    head: Tensors


@dataclass(frozen=True, repr=False)
class Adapter(AdapterMethods):
    """A trained adapter.

    ``sites`` maps a site to its size, ``tensors`` a site to the type's tensors. ``shifts`` are changes of biases and
    LayerNorm parameters, by name. ``training`` is provenance (examples, epochs, seed, data fingerprint, versions …),
    ``scores`` what was measured on the rows held out from train. ``statistics`` are what data-driven merges need, by
    kind and site.
    """

    type: str
    config: AdapterConfig
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

    def __repr__(self) -> str:
        """One line."""
        tensors = (self.shifts, self.head, *self.tensors.values())
        size = mebibytes(sum(tensor.nbytes for found in tensors for tensor in found.values()))
        rank, sites = f" of rank {self.config.rank}" if self.sites else "", f"{len(self.sites)} sites"
        return summary("Adapter", self.tasks, f"{self.type}{rank}", f"base {self.base.name!r}", sites, size)

    @property
    def name(self) -> str:
        """Adapters are known by their task."""
        return self.task.name

    def deltas(self) -> dict[str, Delta]:
        """The Delta of every site, worked out in float32 or wider whatever its tensors are kept in."""
        kind = TYPES.get(self.type)
        return {
            site: kind.delta({name: _wide(tensor) for name, tensor in tensors.items()}, self.config.at(site))
            for site, tensors in self.tensors.items()
        }

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks it answers: its own."""
        return (self.task,)

    def part(self, task: str) -> Part:
        """What it takes to answer ``task`` (its own, which is checked by the caller)."""
        return Part(self.task, self.max_length, self.deltas(), self.shifts, self.head)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
