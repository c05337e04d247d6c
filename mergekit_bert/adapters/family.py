"""Families of adapters: everything that differs between LoRA and another way of changing an encoder for a task.

A family changes up to three things: the weights of linear layers, its *sites*, by Deltas; biases and norms, its
*shifts*, which are trained whole; and what it adds, its *extras*, tensors that are new to the encoder. Their names are
recorded with every adapter, and ``a+b`` is the family that changes what ``a`` and ``b`` change (:func:`sum_of`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.extra import Extra
from mergekit_bert.adapters.linear import AdaptedLinear
from mergekit_bert.arguments import from_text
from mergekit_bert.errors import TrainingError
from mergekit_bert.registry import Registry, unknown

Size = tuple[int, int]
"""(out_features, in_features) of a site."""
Tensors = Mapping[str, Tensor]
Weight = Callable[[], Tensor]
"""The frozen weight ``W`` of a site, (out, in) in float32: read when it is asked for."""


@dataclass(frozen=True)
class Peft:
    """How PEFT stores a family.

    ``type`` is its ``peft_type``; ``tensors`` gives the ending of each tensor's name, ``options`` the setting that each
    option is; ``switches`` are the settings that are on. ``lacks`` are options that change the Delta and that PEFT has
    no setting for. ``biases``: it has a place for biases that are trained whole.
    """

    type: str
    tensors: Mapping[str, str]
    options: Mapping[str, str]
    switches: frozenset[str] = frozenset()
    lacks: tuple[str, ...] = ()
    biases: bool = False


@dataclass(frozen=True)
class Sites:
    """What a family puts beside linear layers; its functions receive the options that hold at the site.

    ``shapes`` names the tensors of a site and ``init`` makes them as training begins; ``delta`` is the change of the
    site's weight, differentiable in the tensors, and ``module`` the layer that trains them beside the frozen one.
    ``basis_tensor`` is the one that rows of a basis give and freeze, None where a basis cannot keep its Deltas apart.
    ``needs_weight``: its Deltas cannot be made without the base's weights. The options' ``targets`` say where the
    sites are, see :class:`~mergekit_bert.adapters.config.Options`.
    """

    shapes: Callable[[Any, Size], dict[str, tuple[int, ...]]]
    init: Callable[[Any, Size, Tensor | None, Weight, torch.Generator], dict[str, Tensor]]
    delta: Callable[[Tensors, Any, Weight], Delta]
    module: type[AdaptedLinear]
    basis_tensor: str | None = None
    needs_weight: bool = False

    def frozen(self, basis: object | None) -> frozenset[str]:
        """The tensors that are not trained, and not stored, where there is a ``basis``."""
        return frozenset({self.basis_tensor} if basis and self.basis_tensor else ())


@dataclass(frozen=True, eq=False)
class Family:
    """One way of changing an encoder: everything that differs between LoRA and another one.

    ``options`` is the record of its options. ``sites`` is what it puts beside linear layers, None for a family without
    them. ``shifts`` names the encoder's parameters, biases and norms, that are trained whole. ``extras`` are tensors
    that it adds to the encoder. ``peft`` is None where PEFT does not know it. ``lr`` and ``head_lr`` are the peak
    learning rates it needs, where they are not the usual ones.
    """

    name: str
    description: str
    source: str
    options: type[Options] = Options
    sites: Sites | None = None
    shifts: Callable[[Any, nn.Module], list[str]] | None = None
    extras: tuple[Extra, ...] = ()
    peft: Peft | None = None
    lr: float | None = None
    head_lr: float | None = None

    @property
    def head_alone(self) -> bool:
        """Whether it changes nothing of the encoder."""
        return self.sites is None and self.shifts is None and not self.extras

    def shifted(self, options: Options, tree: nn.Module) -> list[str]:
        """The parameters of an encoder's ``tree`` that are trained whole, as the family or its ``options`` say."""
        named = {*options.shifts(tree), *(self.shifts(options, tree) if self.shifts else ())}
        return [parameter for parameter, _ in tree.named_parameters() if parameter in named]

    @property
    def needs_weight(self) -> bool:
        """Whether its Deltas cannot be made without the base's weights."""
        return self.sites is not None and self.sites.needs_weight

    def frozen(self, basis: object | None) -> frozenset[str]:
        """The tensors of a site that are not trained, and not stored, where there is a ``basis``."""
        return self.sites.frozen(basis) if self.sites else frozenset()

    def configured(self, given: Mapping[str, Any], record: Options | None = None) -> Any:
        """Its options: those ``given``, then those of ``record`` (a family's, perhaps another's), then the defaults.

        Raises TrainingError for an option that means nothing to it, unless it has the value that its files record.
        """
        given = {**_not_default(record), **given} if record is not None else given
        own = [one.name for one in dataclasses.fields(self.options)]
        recorded = self.options.recorded
        given = {name: value for name, value in given.items() if recorded.get(name, ...) != value}
        for name in given:
            if name not in own:
                options = f"one of {', '.join(own)}" if own else "no options"
                remedy = f"drop `{name}`, or choose another `type`"
                found = f"an option that `type={self.name}` does not have"
                raise TrainingError(f"`{name}`", found, options, remedy)
        return self.options(**given)

    def read(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Values of its options that are given as texts; raises UnknownNameError, TrainingError or ArgumentError."""
        own = [one.name for one in dataclasses.fields(self.options)]
        for name in texts:
            if not own:
                where = f"option {name!r} of {self.name}"
                raise TrainingError(where, "no such option", "none: it has no options", "drop it")
            if name not in own:
                raise unknown(f"option of {self.name}", name, own)
        return {name: from_text(self.options, name, text) for name, text in texts.items()}


def _not_default(record: Options) -> dict[str, Any]:
    """The options of ``record`` that are not its defaults."""
    usual = type(record)()
    values = {one.name: getattr(record, one.name) for one in dataclasses.fields(record)}
    return {**record.recorded, **{name: one for name, one in values.items() if one != getattr(usual, name)}}


def sum_of(parts: Sequence[Family]) -> Family:
    """The family that changes what each of ``parts`` changes, with the options of all: ``lora+bitfit``.

    The name is the same for every order. Raises TrainingError where a part comes twice or changes nothing, or where
    two parts adapt linear layers.
    """
    return _sum(tuple(sorted(parts, key=lambda one: (one.sites is None, one.name))))


@functools.cache
def _sum(parts: tuple[Family, ...]) -> Family:
    """Of parts in order: one record for each, with one record of options."""
    name = "+".join(one.name for one in parts)
    sited = [one for one in parts if one.sites]
    if len({one.name for one in parts}) < len(parts):
        raise _no_sum(name, "a part that comes twice", "each part once")
    if len(sited) > 1:
        raise _no_sum(name, f"{sited[0].name} and {sited[1].name}, which both adapt linear layers", "one such part")
    for one in parts:
        if one.head_alone:
            raise _no_sum(name, f"{one.name}, which changes nothing of the encoder", "parts that change something")
    shifting = [one.shifts for one in parts if one.shifts]

    def shifts(options: Any, tree: nn.Module) -> list[str]:
        named = {parameter for part in shifting for parameter in part(options, tree)}
        return [parameter for parameter, _ in tree.named_parameters() if parameter in named]

    return Family(
        name=name,
        description="; ".join(one.description for one in parts),
        source="; ".join(one.source for one in parts),
        options=_all_options([one.options for one in parts], name),
        sites=sited[0].sites if sited else None,
        shifts=shifts if shifting else None,
        extras=tuple(extra for one in parts for extra in one.extras),
        peft=sited[0].peft if sited else None,
        lr=parts[0].lr,
        head_lr=parts[0].head_lr,
    )


def _no_sum(name: str, found: str, expected: str) -> TrainingError:
    return TrainingError(f"`type={name}`", found, expected, "correct `type`")


def _all_options(records: Sequence[type[Options]], name: str) -> type[Options]:
    """A record with the options of all ``records``: one of them, where it has the others' options as well."""
    kept = [
        one
        for one in dict.fromkeys(records)
        if not any(other is not one and issubclass(other, one) for other in records)
    ]
    if len(kept) == 1:
        return kept[0]
    recorded = {key: value for one in kept for key, value in one.recorded.items()}
    made: type[Options] = dataclasses.make_dataclass(
        f"Options of {name}", [], bases=tuple(kept), namespace={"recorded": recorded}, frozen=True
    )
    return made


class _Families(Registry[Family]):
    """The families by name, and the sums of them."""

    def get(self, name: str) -> Family:
        """The family called ``name``, or of that sum of names; raises UnknownNameError, or TrainingError for a sum."""
        if "+" not in name:
            return super().get(name)
        return sum_of([super(_Families, self).get(part.strip()) for part in name.split("+")])


FAMILIES = _Families("mergekit_bert.adapters.families", "adapter type", Family, "mbert.families")


def extra_of(name: str) -> Extra:
    """The extra called ``name``, which the family of that name brings; raises UnknownNameError."""
    return next(one for one in FAMILIES.get(name).extras if one.name == name)
