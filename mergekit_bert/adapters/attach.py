"""Attaching: the only code that edits a module tree. It always edits a tree of the caller's own.

``attach`` puts trainable adapters beside the sites, for training. ``fold`` adds finished Deltas to the weights, for
everything else: a folded model costs what the bare encoder costs.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.delta import apply
from mergekit_bert.adapters.family import FAMILIES, Tensors, extra_of
from mergekit_bert.adapters.linear import AdaptedLinear, SeededDropout
from mergekit_bert.adapters.patch import Extras, Part, Patch, TaskSpecific
from mergekit_bert.adapters.routed import RoutedLinear, RoutedModule
from mergekit_bert.encoder.classifier import share
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.load import Encoder


def _replace(tree: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the one called ``name`` is; what was hooked to that place stays there."""
    parent, _, child = name.rpartition(".")
    old = tree.get_submodule(name)
    module._forward_pre_hooks.update(old._forward_pre_hooks)
    old._forward_pre_hooks.clear()
    setattr(tree.get_submodule(parent), child, module)


def attach(
    model: Classifier,
    kind: str,
    tensors: Mapping[str, Tensors],
    frozen: frozenset[str],
    config: Options,
    source: torch.Generator,
) -> dict[str, dict[str, nn.Parameter]]:
    """Put an adapter of family ``kind`` beside every site of ``tensors``; returns the parameters in the same shape."""
    beside, placed = FAMILIES.get(kind).sites, {}
    for site, values in tensors.items():
        assert beside is not None
        linear = model.encoder.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        adapted = beside.module(linear, values, frozen, config.at(site), source)
        _replace(model.encoder, site, adapted)
        placed[site] = dict(adapted.tensors.items())
    return placed


def attach_extras(tree: nn.Module, extras: Extras) -> dict[str, dict[str, nn.Parameter]]:
    """Bring ``extras`` into ``tree``, for whatever rows; returns their parameters in the same shape."""
    return _install(tree, {0: extras})[0]


def _install(tree: nn.Module, extras: Mapping[int, Extras]) -> dict[int, dict[str, dict[str, nn.Parameter]]]:
    """Bring in the extras of several adapters, by number; what is put in a module's place has its parameters."""
    device = next(tree.parameters()).device
    placed = {
        number: {
            name: {key: nn.Parameter(value.to(device, copy=True), requires_grad=False) for key, value in one.items()}
            for name, one in own.items()
        }
        for number, own in extras.items()
    }
    for name in sorted({name for own in placed.values() for name in own}):
        owned = {number: own[name] for number, own in placed.items() if name in own}
        for place, module in extra_of(name).modules(tree, owned).items():
            parent, _, child = place.rpartition(".")
            setattr(tree.get_submodule(parent), child, module)
    return placed


def attach_routed(encoder: Encoder, parts: Sequence[Part]) -> nn.Module:
    """The encoder's tree with many adapters beside it, known by their place in ``parts``; rows choose by the layout."""
    tree = share(encoder.model)
    for site in sorted({site for part in parts for site in part.deltas}):
        linear = tree.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        deltas = {number: part.deltas[site] for number, part in enumerate(parts) if site in part.deltas}
        _replace(tree, site, RoutedLinear(linear, deltas))
    _install(tree, {number: part.extras for number, part in enumerate(parts)})
    shifted = {name.rpartition(".")[0] for part in parts for name in part.shifts}
    for name in sorted(shifted):
        place = f"{name}.linear" if isinstance(tree.get_submodule(name), RoutedLinear) else name
        module = tree.get_submodule(place)
        own = {
            number: {n.rpartition(".")[2]: v for n, v in part.shifts.items() if n.rpartition(".")[0] == name}
            for number, part in enumerate(parts)
        }
        _replace(tree, place, RoutedModule(module, {number: shifts for number, shifts in own.items() if shifts}))
    return tree.requires_grad_(False)


def unfreeze(tree: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """Give ``tree`` trainable copies of the named parameters, its own and no longer shared."""
    fresh = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = tree.get_submodule(parent)
        fresh[name] = nn.Parameter(getattr(owner, child).detach().clone())
        setattr(owner, child, fresh[name])
    return fresh


def set_head_dropout(model: Classifier, p: float, source: torch.Generator) -> None:
    """Replace the head's own dropout by a seeded one."""
    for name, module in model.head_modules().items():
        if isinstance(module, nn.Dropout):
            _replace(model, name, SeededDropout(p, source))


def dropout_on(model: nn.Module, on: bool) -> None:
    """Switch the seeded dropouts; the encoder itself always runs as at inference."""
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.train(on)


def cast_frozen(model: nn.Module, dtype: torch.dtype, known: Mapping[int, nn.Parameter] | None = None) -> None:
    """Keep copies of the frozen parameters in ``dtype``; what is trained stays as it is.

    ``known`` are copies already made, by the identity of what they were made of: several trees may share them.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype != dtype:
                copy = (known or {}).get(id(parameter))
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False) if copy is None else copy)


def copies(model: nn.Module, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """The parameters of ``model`` in ``dtype``, for :func:`cast_frozen`; good while ``model`` lives."""
    return {id(one): nn.Parameter(one.to(dtype), requires_grad=False) for one in model.parameters()}


def fold(encoder: Encoder, patch: Patch | Part | TaskSpecific) -> Encoder:
    """``encoder`` with Deltas added to the sites' weights, shifts to the other parameters, in float32, and extras.

    The result shares every tensor that is not changed. Of a site that has an adapter beside it, the frozen layer is
    changed, in the dtype that it is kept in.
    """
    tree = share(encoder.model)
    weights, shifts = {f"{site}.weight": delta for site, delta in patch.deltas.items()}, patch.shifts
    for name in [*weights, *shifts]:
        parent, _, child = name.rpartition(".")
        owner = tree.get_submodule(parent)
        layer = owner.linear if isinstance(owner, AdaptedLinear) else owner
        old = layer.get_parameter(child)
        value = apply(old, weights[name]) if name in weights else old + shifts[name].to(old.device)
        value = value if layer is owner else value.to(old.dtype)
        setattr(layer, child, nn.Parameter(value, requires_grad=False))
    attach_extras(tree, patch.extras)
    return dataclasses.replace(encoder, model=tree)


def patched(name: str, weight: Tensor, patch: Patch | Part) -> Tensor:
    """The parameter ``name`` of an encoder with ``patch`` added to it, as :func:`fold` makes it, without a tree."""
    if name in patch.shifts:
        return weight + patch.shifts[name].to(weight.device)
    site = name.removesuffix(".weight")
    return apply(weight, patch.deltas[site]) if site != name and site in patch.deltas else weight
