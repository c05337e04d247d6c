"""Classifiers: an encoder's tree under a head for a task, with given values or fresh ones."""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import HEADS, NATIVE, Classifier, Head, head_of
from mergekit_bert.encoder.load import Encoder


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor: editing the copy leaves the original as it is."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def classifier(encoder: Encoder, task: Task, head: Mapping[str, Tensor]) -> Classifier:
    """``encoder`` under a head for ``task`` with the given tensors."""
    return bare_head(encoder.config, task, head, share(encoder.model))


def fresh_classifier(encoder: Encoder, task: Task, source: torch.Generator, head: str = NATIVE) -> Classifier:
    """``encoder`` under the head called ``head`` for ``task``, its values drawn from ``source``."""
    kind = HEADS.get(head)
    kind.check(task)
    model = kind.over(encoder.config, task, share(encoder.model))
    kind.start(model, task, encoder.config, source)
    return _frozen(model)


def bare_head(config: Any, task: Task, head: Mapping[str, Tensor], under: nn.Module) -> Classifier:
    """A head for ``task`` as it fits on encoders of ``config``, with any module ``under`` it."""
    model = head_of(head).over(config, task, under)
    model.load_head(head)
    return _frozen(model)


def _frozen(model: Classifier) -> Classifier:
    return model.eval().requires_grad_(False)


def head_shapes(config: Any, task: Task, head: Head | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a head (None: the native one) for ``task``."""
    kind = head or HEADS.get(NATIVE)
    kind.check(task)
    return {name: tuple(parameter.shape) for name, parameter in kind.over(config, task, nn.Identity()).head().items()}
