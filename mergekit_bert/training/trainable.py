"""What is trained: an adapter, only a head, or the whole encoder; each as a model and its named parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_bert.adapters.attach import attach, attach_extras, set_head_dropout, unfreeze
from mergekit_bert.adapters.avoiding import FrozenRows
from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.extra import Virtual
from mergekit_bert.adapters.family import FAMILIES, Family, Size
from mergekit_bert.adapters.patch import virtual_tokens
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.head import HEADS, Classifier, Head
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import find_sites
from mergekit_bert.hardware import generator
from mergekit_bert.training.config import TrainConfig


@dataclass(frozen=True)
class Trainable:
    """A model in training.

    ``parameters`` are named ``site.<site>.<tensor>``, ``extra.<name>.<tensor>``, ``shift.<parameter>`` (full values;
    their change is computed at the end), ``encoder.<parameter>`` and ``head.<tensor>``. ``source`` is the generator of
    all dropouts.
    """

    model: Classifier
    parameters: Mapping[str, nn.Parameter]
    source: torch.Generator


def sites_of(encoder: Encoder, family: Family, config: Options, head: Head) -> dict[str, Size]:
    """The linear layers that an adapter of ``family`` stands beside: those that ``head`` reads, none without sites."""
    found = find_sites(encoder, config.targets) if family.sites else {}
    return {site: size for site, size in found.items() if head.reads(site)}


def virtual_of(encoder: Encoder, family: Family, config: Options) -> Virtual:
    """The virtual tokens that an adapter of ``family`` adds to a sequence."""
    return virtual_tokens({extra.name: extra.shapes(config, extra.size(encoder)) for extra in family.extras})


def adapter_trainable(
    encoder: Encoder,
    task: Task,
    family: str,
    config: Options,
    sites: Mapping[str, Size],
    basis: FrozenRows | None,
    train: TrainConfig,
) -> Trainable:
    """An adapter of ``family`` at ``sites``, and a head; ``basis`` provides a frozen tensor for every site."""
    record, (model, source) = FAMILIES.get(family), _fresh(encoder, task, train)
    names = record.shifted(config, model.encoder)
    shifts = unfreeze(model.encoder, [name for name in names if HEADS.get(train.head).reads(name)])
    values = {
        site: record.sites.init(
            config.at(site),
            size,
            basis.matrix(site, size[1]) if basis else None,
            partial(_weight, encoder, site),
            generator(train.seed, 2, place),
        )
        for place, (site, size) in enumerate(sites.items())
        if record.sites
    }
    frozen = record.frozen(basis)
    placed = attach(model, family, values, frozen, config, source)
    parameters = {
        f"site.{site}.{name}": parameter
        for site, attached in placed.items()
        for name, parameter in attached.items()
        if name not in frozen
    }
    parameters |= {f"shift.{name}": parameter for name, parameter in shifts.items()}
    extras = {
        extra.name: extra.init(config, encoder, generator(train.seed, 4, place))
        for place, extra in enumerate(record.extras)
    }
    for name, attached in attach_extras(model.encoder, extras).items():
        parameters |= {f"extra.{name}.{key}": parameter for key, parameter in attached.items()}
    return _finish(model, parameters, source)


def _weight(encoder: Encoder, site: str) -> Tensor:
    return encoder.model.get_parameter(f"{site}.weight").detach().cpu().float()


def full_trainable(encoder: Encoder, task: Task, train: TrainConfig) -> Trainable:
    """Every weight of the encoder, and a head."""
    model, source = _fresh(encoder, task, train)
    names = [name for name, _ in model.encoder.named_parameters() if HEADS.get(train.head).reads(name)]
    parameters = {f"encoder.{name}": p for name, p in unfreeze(model.encoder, names).items()}
    return _finish(model, parameters, source)


def _fresh(encoder: Encoder, task: Task, train: TrainConfig) -> tuple[Classifier, torch.Generator]:
    model = fresh_classifier(encoder, task, generator(train.seed, 1), train.head)
    source = generator(train.seed, 3, device=next(encoder.model.parameters()).device)
    set_head_dropout(model, train.head_dropout, source)
    return model, source


def _finish(model: Classifier, parameters: dict[str, nn.Parameter], source: torch.Generator) -> Trainable:
    parameters |= {f"head.{name}": parameter for name, parameter in model.head().items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return Trainable(model, parameters, source)
