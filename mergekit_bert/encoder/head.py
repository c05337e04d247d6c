"""What a head is: from what the encoder gives for the texts of a row to the outputs of its task.

Everything that differs between heads is said here, once for each head, in one file of
:mod:`mergekit_bert.encoder.heads`; no other module asks which head it has. A regression's head gives its value on
0…1; the task's range scales it.
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
    """An encoder tree of its own under a head: ``forward(**inputs)`` gives outputs of shape (rows, outputs).

    The parameters of the encoder begin with ``encoder_prefix``, those of the head with ``head_prefix``. A row is
    ``sequences`` token sequences. ``every_token``: the head reads all tokens, not the first of a sequence alone.
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
        """What the head reads of the last layer's states, in a forward pass under way."""

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
    """A head. Its tensors are called ``<name>.<tensor>``, which tells whose they are; the native head's as they are.

    ``apart``: the texts of a row are encoded as sequences of their own, not together as one. ``every_token`` is that of
    its classifiers; a head that reads all tokens reads no pooler of the encoder's.
    """

    name: str
    description: str
    source: str
    apart: bool = False
    every_token: bool = True
    is_native: bool = False
    """Whether it is transformers' own, which ``AutoModelForSequenceClassification`` loads."""

    def check(self, task: Task) -> None:  # noqa: B027 (most heads answer every task)
        """Raise TrainingError for a task that it cannot answer."""

    def reads(self, name: str) -> bool:
        """Whether its outputs depend on the encoder's site or parameter called so."""
        return not (self.every_token and of_the_head(name))

    @abstractmethod
    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        """A classifier for ``task`` over any module, as it fits on encoders of ``config``, its values not yet set."""

    def output_layer(self, model: Classifier) -> nn.Linear | None:
        """The linear layer that gives the outputs of ``model``: in a folder, a regression's range is folded into it.

        None where none does: the folder's outputs are then on 0…1, and whoever reads it scales them.
        """
        return None

    @abstractmethod
    def prefix(self, model: Classifier) -> str:
        """How the names of the encoder's weights begin in a Hugging Face folder."""

    @abstractmethod
    def write_config(self, folder: Path, model: Classifier, encoder: nn.Module, task: Task) -> None:
        """Write what a Hugging Face folder has beside the encoder's weights and the tokenizer."""

    def start(self, model: Classifier, task: Task, config: Any, source: torch.Generator) -> None:
        """Set the values of a fresh head."""
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
    """The head whose tensors are called so."""
    owners = {name.partition(".")[0] for name in tensors}
    return HEADS.get(next((name for name in HEADS.names() if owners == {name}), NATIVE))
