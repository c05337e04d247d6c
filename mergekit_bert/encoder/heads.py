"""Heads: what turns the encoder's output into a task's answer.

The head is the one that transformers' ``…ForSequenceClassification`` of the architecture puts on its encoder, so
that every model of mbert's can be written as a plain Hugging Face folder. A regression's head gives its value on
0…1; the task's range scales it.
"""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder, reset
from mergekit_bert.encoder.pretrained import skeleton
from mergekit_bert.errors import EncoderError
from mergekit_bert.hardware import default_device


class Classifier(nn.Module):
    """An encoder tree of its own under a head: ``forward(**inputs)`` gives outputs of shape (rows, outputs)."""

    def __init__(self, shell: Any) -> None:
        """``shell`` is a transformers model for sequence classification."""
        super().__init__()
        self.shell = shell

    @property
    def encoder(self) -> nn.Module:
        """The encoder's module tree."""
        model: nn.Module = self.shell.base_model
        return model

    def head(self) -> dict[str, nn.Parameter]:
        """The head's parameters by name."""
        prefix = f"{self.shell.base_model_prefix}."
        return {name: p for name, p in self.shell.named_parameters() if not name.startswith(prefix)}

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the head."""
        with torch.no_grad():
            for name, parameter in self.head().items():
                parameter.copy_(tensors[name])

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs (rows, outputs): logits, or a value on 0…1."""
        logits: Tensor = self.shell(**inputs).logits
        return logits


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor: editing the copy leaves the original as it is."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def head_config(encoder: Encoder, task: Task) -> Any:
    """The transformers configuration of ``encoder`` with a head for ``task``."""
    config = copy.deepcopy(encoder.config)
    config.num_labels = task.outputs
    fields = kind_of(task).hub(task)
    config.id2label, config.problem_type = dict(fields.id2label), fields.problem_type
    config.label2id = {name: index for index, name in config.id2label.items()}
    return config


def classifier(encoder: Encoder, task: Task, head: Mapping[str, Tensor] | torch.Generator) -> Classifier:
    """``encoder`` under a head for ``task``: with the given tensors, or fresh ones drawn from a generator."""
    return bare_head(encoder, task, head, share(encoder.model))


def bare_head(
    encoder: Encoder, task: Task, head: Mapping[str, Tensor] | torch.Generator, under: nn.Module
) -> Classifier:
    """A head for ``task`` as it fits on ``encoder``, with any module ``under`` it."""
    config = head_config(encoder, task)
    shell = skeleton(config)
    setattr(shell, shell.base_model_prefix, under)
    for name, module in shell.named_children():
        if name != shell.base_model_prefix:
            module.to_empty(device=default_device())
    model = Classifier(shell)
    if isinstance(head, torch.Generator):
        for name, parameter in model.head().items():
            reset(name, parameter, config, head)
    else:
        model.load_head(head)
    return model.eval().requires_grad_(False)


def head_shapes(encoder: Encoder, task: Task) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a head for ``task``."""
    model = bare_head(encoder, task, torch.Generator(), nn.Identity())
    return {name: tuple(parameter.shape) for name, parameter in model.head().items()}


def last_linear(model: Classifier) -> nn.Linear:
    """The linear layer that gives the outputs."""
    prefix = model.shell.base_model_prefix
    layers = [
        module
        for name, module in model.shell.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{prefix}.")
    ]
    if not layers:
        raise EncoderError("head", "no linear layer", "a head that ends in one", "use another architecture")
    return layers[-1]
