"""Adapters in memory: what training gave one task, and what a family of adapters is."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.linear import AdaptedLinear
from mergekit_bert.adapters.statistics import Statistic
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import head_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.model_methods import AdapterMethods, mebibytes, summary
from mergekit_bert.registry import Registry
from mergekit_bert.schema import STRICT, BaseName, Sha256

Size = tuple[int, int]
"""(out_features, in_features) of a site."""
Tensors = Mapping[str, Tensor]
Weight = Callable[[], Tensor]
"""The frozen weight ``W`` of a site, (out, in) in float32: read when it is asked for."""


@dataclass(frozen=True)
class Peft:
    """How PEFT stores a family: the ending of each tensor's name, and which of its switches are on."""

    tensors: Mapping[str, str]
    switches: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Family:
    """One way of adapting a linear layer: everything that differs between LoRA and another one.

    ``options`` is the record of its options. ``shapes`` names the tensors of a site and ``init`` makes them as training
    begins; ``delta`` is the change of the site's weight, differentiable in the tensors, and ``module`` the layer that
    trains them beside the frozen one. ``basis_tensor`` is the one that rows of a basis give and freeze, None where a
    basis cannot keep its Deltas apart. ``needs_weight``: its Deltas cannot be made without the base's weights. ``peft``
    is None where PEFT does not know it. ``lr`` and ``head_lr`` are the peak learning rates it needs, where they are not
    the usual ones. A family without sites is a head alone.
    """

    name: str
    description: str
    source: str
    shapes: Callable[[AdapterConfig, Size], dict[str, tuple[int, ...]]]
    init: Callable[[AdapterConfig, Size, Tensor | None, Weight, torch.Generator], dict[str, Tensor]]
    delta: Callable[[Tensors, AdapterConfig, Weight], Delta]
    module: type[AdaptedLinear]
    options: type[AdapterConfig] = AdapterConfig
    basis_tensor: str | None = None
    needs_weight: bool = False
    has_sites: bool = True
    peft: Peft | None = None
    lr: float | None = None
    head_lr: float | None = None

    def frozen(self, basis: object | None) -> frozenset[str]:
        """The tensors that are not trained, and not stored, where there is a ``basis``."""
        return frozenset({self.basis_tensor} if basis and self.basis_tensor else ())


FAMILIES = Registry("mergekit_bert.adapters.families", "adapter type", Family, "mbert.families")


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

    def tokens(self, encoder: Encoder, rows: Rows) -> Tokens:
        """Rows of its task as its head reads them, without their labels."""
        unlabelled = dataclasses.replace(rows, labels=None)
        apart = head_of(self.head).apart
        return tokenise(unlabelled, self.task, encoder.tokenizer, self.max_length, encoder.pad_token, apart)


@dataclass(frozen=True, repr=False)
class Adapter(AdapterMethods):
    """A trained adapter.

    ``type`` names its family. ``sites`` maps a site to its size, ``tensors`` a site to the family's tensors. ``shifts``
    are changes of biases and LayerNorm parameters, by name. ``training`` is provenance (examples, epochs, seed, data
    fingerprint, versions …), ``scores`` what was measured on the rows held out from train. ``statistics`` are what
    data-driven merges need, by kind and site. ``weights`` are the base's, by parameter, for a family whose Deltas need
    them: they are in no file, see :meth:`on`.
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
    weights: Tensors | None = field(default=None, compare=False, repr=False)

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
        family = self.family
        return {
            site: family.delta(
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

    def part(self, task: str) -> Part:
        """What it takes to answer ``task`` (its own, which is checked by the caller)."""
        return Part(self.task, self.max_length, self.deltas(), self.shifts, self.head)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
