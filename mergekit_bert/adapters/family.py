"""Families of adapters: everything that differs between LoRA and another way of adapting a linear layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.extra import Extra
from mergekit_bert.adapters.linear import AdaptedLinear
from mergekit_bert.registry import Registry

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
    extras: tuple[Extra, ...] = ()
    peft: Peft | None = None
    lr: float | None = None
    head_lr: float | None = None

    def frozen(self, basis: object | None) -> frozenset[str]:
        """The tensors that are not trained, and not stored, where there is a ``basis``."""
        return frozenset({self.basis_tensor} if basis and self.basis_tensor else ())


FAMILIES = Registry("mergekit_bert.adapters.families", "adapter type", Family, "mbert.families")


def extra_of(name: str) -> Extra:
    """The extra called ``name``, which the family of that name brings; raises UnknownNameError."""
    return next(one for one in FAMILIES.get(name).extras if one.name == name)
