"""The interface of heads, which compute the outputs of a task from the encoder's last states.

Everything that differs between heads is in the head's file in :mod:`mergekit_bert.encoder.heads`; no other module
checks which head it has. A regression's head returns a value in 0…1, which is scaled to the task's range.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import reset
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.registry import Registry

NATIVE = "native"


class Classifier(nn.Module, ABC):
    """An encoder's module tree with a head: ``forward(**inputs)`` returns outputs of shape (rows, outputs).

    The names of the encoder's parameters begin with ``encoder_prefix``, those of the head with ``head_prefix``. A row
    is ``sequences`` token sequences. ``every_token``: the head reads all tokens, not only the first of each sequence.
    """

    encoder_prefix: str
    head_prefix: str
    every_token: bool
    sequences: int

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The encoder's module tree."""

    @abstractmethod
    def features(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "rows features"]:
        """The part of the last layer's states that the head uses, during a forward pass."""

    def head(self) -> dict[str, nn.Parameter]:
        """The head's parameters by name."""
        return {
            name.removeprefix(self.head_prefix): parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(self.encoder_prefix)
        }

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the head."""
        with torch.no_grad():
            for name, parameter in self.head().items():
                parameter.copy_(tensors[name])

    def head_modules(self) -> dict[str, nn.Module]:
        """The head's modules by their names in the tree."""
        under = self.encoder_prefix.removesuffix(".")
        return {
            name: module
            for name, module in self.named_modules()
            if name not in ("", under) and not name.startswith(self.encoder_prefix)
        }


class Head(ABC):
    """A head. Its tensors are named ``<name>.<tensor>``; those of the native head have transformers' names.

    ``apart``: the texts of a row are encoded as separate sequences, not together as one. ``every_token`` is that of its
    classifiers; a head that reads all tokens does not use the encoder's pooler.
    """

    name: str
    description: str
    source: str
    apart: bool = False
    every_token: bool = True
    is_native: bool = False
    """Whether it is transformers' own, which ``AutoModelForSequenceClassification`` loads."""

    def check(self, task: Task) -> None:  # noqa: B027 (most heads answer every task)
        """Raise TrainingError for a task that it does not support."""

    def reads(self, name: str) -> bool:
        """Whether its outputs depend on the encoder's site or parameter ``name``."""
        return not (self.every_token and of_the_head(name))

    @abstractmethod
    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        """A classifier for ``task`` on the module ``under``, for encoders of ``config``, uninitialised."""

    def output_layer(self, model: Classifier) -> nn.Linear | None:
        """The linear layer that computes the outputs of ``model``: for folders, a regression's range is folded into it.

        None if there is none: the folder's outputs are then in 0…1 and scaled by the reader.
        """
        return None

    @abstractmethod
    def prefix(self, model: Classifier) -> str:
        """The prefix of the encoder's weights in a Hugging Face folder."""

    @abstractmethod
    def write_config(self, folder: Path, model: Classifier, encoder: nn.Module, task: Task) -> None:
        """Write the files of a Hugging Face folder other than the encoder's weights and the tokenizer."""

    def start(self, model: Classifier, task: Task, config: Any, source: torch.Generator) -> None:
        """Initialise a new head."""
        for name, parameter in model.head().items():
            reset(name, parameter, config, source)


def head_config(config: Any, task: Task) -> Any:
    """An encoder's transformers configuration with the labels of ``task``."""
    config = copy.deepcopy(config)
    config.num_labels = task.outputs
    fields = kind_of(task).to_hub(task)
    config.id2label, config.problem_type = dict(fields.id2label), fields.problem_type or None
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.update(dict(fields.more))
    return config


HEADS: Registry[Head] = Registry(
    "mergekit_bert.encoder.heads",
    "head",
    Head,  # type: ignore[type-abstract]
    "mbert.heads",
)


def head_of(tensors: Iterable[str]) -> Head:
    """The head that has tensors of these names."""
    owners = {name.partition(".")[0] for name in tensors}
    return HEADS.get(next((name for name in HEADS.names() if owners == {name}), NATIVE))
