"""Attaching adapters to an encoder: the only code that edits a module tree, always one that the caller copied.

``attach`` adds trainable adapters to the sites, for training. ``fold`` adds finished Deltas to the weights, for
everything else: a folded model is as fast as the bare encoder.
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
    """Replace the module called ``name`` by ``module``, which takes over its forward pre-hooks."""
    parent, _, child = name.rpartition(".")
    old = tree.get_submodule(name)
    module._forward_pre_hooks.update(old._forward_pre_hooks)
    old._forward_pre_hooks.clear()
    setattr(tree.get_submodule(parent), child, module)


def attach(
    model: Classifier,
    family: str,
    tensors: Mapping[str, Tensors],
    frozen: frozenset[str],
    config: Options,
    source: torch.Generator,
) -> dict[str, dict[str, nn.Parameter]]:
    """Attach an adapter of ``family`` at every site of ``tensors``; returns the parameters in the same structure."""
    sites, placed = FAMILIES.get(family).sites, {}
    for site, values in tensors.items():
        assert sites is not None
        linear = model.encoder.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        adapted = sites.module(linear, values, frozen, config.at(site), source)
        _replace(model.encoder, site, adapted)
        placed[site] = dict(adapted.tensors.items())
    return placed


def attach_extras(tree: nn.Module, extras: Extras) -> dict[str, dict[str, nn.Parameter]]:
    """Insert ``extras`` into ``tree``, for all rows; returns their parameters in the same structure."""
    return _install(tree, {0: extras})[0]


def _install(tree: nn.Module, extras: Mapping[int, Extras]) -> dict[int, dict[str, dict[str, nn.Parameter]]]:
    """Insert the extras of several adapters, by number; returns their parameters."""
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
    """The encoder's tree with several adapters, numbered as in ``parts``; the layout assigns rows to adapters."""
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
    """Replace the named parameters of ``tree`` by trainable copies, which are not shared."""
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
    """Switch the seeded dropouts on or off; the encoder always runs in inference mode."""
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.train(on)


def cast_frozen(model: nn.Module, dtype: torch.dtype, known: Mapping[int, nn.Parameter] | None = None) -> None:
    """Replace the frozen parameters by copies in ``dtype``; trained parameters keep their dtype.

    ``known`` are existing copies by the identity of the original parameter: several trees may share them.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype != dtype:
                copy = (known or {}).get(id(parameter))
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False) if copy is None else copy)


def copies(model: nn.Module, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """The parameters of ``model`` in ``dtype``, for :func:`cast_frozen`; valid as long as ``model`` exists."""
    return {id(one): nn.Parameter(one.to(dtype), requires_grad=False) for one in model.parameters()}


def fold(encoder: Encoder, patch: Patch | Part | TaskSpecific) -> Encoder:
    """``encoder`` with Deltas added to the sites' weights, shifts to the other parameters, in float32, and extras.

    The result shares every tensor that is not changed. At a site with an attached adapter, the frozen layer is changed,
    in its dtype.
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
    """The parameter ``name`` of an encoder with ``patch`` added to it, as in :func:`fold`, without a module tree."""
    if name in patch.shifts:
        return weight + patch.shifts[name].to(weight.device)
    site = name.removesuffix(".weight")
    return apply(weight, patch.deltas[site]) if site != name and site in patch.deltas else weight
