"""Heads on pooled tokens: the mean of a sequence's last states, and whatever makes outputs of the means of a row."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.data.task import Task
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.head import Classifier, Head, head_config
from mergekit_bert.errors import TrainingError
from mergekit_bert.files import write_json
from mergekit_bert.hardware import default_device
from mergekit_bert.tensorfile import write_plain_tensors

HEAD, MODULES, POOLING = "head.safetensors", "modules.json", "1_Pooling"


class PooledClassifier(Classifier):
    """An encoder, the mean over the tokens of each sequence, and a module from (rows, sequences, width) to outputs."""

    every_token = True
    encoder_prefix = "tree."
    head_prefix = ""

    def __init__(self, tree: nn.Module, name: str, head: nn.Module, sequences: int) -> None:
        """The head's tensors begin with ``name``."""
        super().__init__()
        self.tree, self.name, self.sequences = tree, name, sequences
        self.add_module(name, head.to(default_device()))

    @property
    def encoder(self) -> nn.Module:
        """The encoder's module tree."""
        return self.tree

    def features(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "rows features"]:
        """The means of a row's sequences, one after the other."""
        return packing.mean(states, None).reshape(-1, self.sequences * states.shape[-1])

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs (rows, outputs): logits, or a value on 0…1."""
        states: Tensor = self.tree(**inputs)[0]
        means = packing.mean(states, inputs.get("attention_mask"))
        outputs: Tensor = self.get_submodule(self.name)(means.view(-1, self.sequences, means.shape[-1]))
        return outputs


class Linear(nn.Module):
    """Dropout and a linear layer; what a subclass computes ends in this layer, ``linear``."""

    def __init__(self, features: int, outputs: int) -> None:
        """From ``features`` to ``outputs``."""
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.linear = nn.Linear(features, outputs)

    def forward(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        """``x W + b``."""
        outputs: Tensor = self.linear(self.dropout(x))
        return outputs


class PooledHead(Head):
    """A head on means. A folder of such a model is one of sentence-transformers, which embeds with it.

    The head itself, which sentence-transformers has no module for, lies beside in ``head.safetensors``.
    """

    every_token = True

    def output_layer(self, model: Classifier) -> nn.Linear | None:
        """The layer of a :class:`Linear`; None for other modules."""
        head = model.get_submodule(self.name)
        return head.linear if isinstance(head, Linear) else None

    def prefix(self, model: Classifier) -> str:
        """The encoder stands by itself."""
        return ""

    def write_config(self, folder: Path, model: Classifier, encoder: nn.Module, task: Task) -> None:
        """The encoder's configuration, the list of modules, the pooling, and the head."""
        config = head_config(encoder.config, task)
        config.architectures, config.dtype = [type(encoder).__name__], "float32"
        config.save_pretrained(folder)
        kinds = (("", "Transformer"), (POOLING, "Pooling"))
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(kinds)
        ]
        write_json(folder / MODULES, modules)
        (folder / POOLING).mkdir()
        pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
        write_json(folder / POOLING / "config.json", {**pooling, "pooling_mode_cls_token": False})
        write_plain_tensors(folder / HEAD, {name: value.detach().cpu() for name, value in model.head().items()})


class PairHead(PooledHead):
    """A head that compares two texts, each encoded by itself: its module takes their means, (rows, 2, width)."""

    apart = True

    def check(self, task: Task) -> None:
        """Raise TrainingError for a task that has not two texts."""
        if len(task.text) != 2:
            columns = ", ".join(task.text)
            raise TrainingError(
                f"`head={self.name}`",
                f"task {task.name!r} with the text {columns}",
                "a task with two texts",
                "use `head=mean`",
            )

    @abstractmethod
    def compare(self, config: Any, task: Task) -> nn.Module:
        """The module from the means of two texts, (rows, 2, width), to the outputs."""

    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        """An encoder and :meth:`compare`."""
        return PooledClassifier(under, self.name, self.compare(config, task), 2)

    def start(self, model: Classifier, task: Task, config: Any, source: torch.Generator) -> None:
        """Like any head's; a single output of a :class:`Linear`, a value on 0…1, begins as the first feature."""
        super().start(model, task, config, source)
        layer = self.output_layer(model)
        if task.outputs == 1 and layer is not None:
            with torch.no_grad():
                layer.weight[0, 0] = 1.0
