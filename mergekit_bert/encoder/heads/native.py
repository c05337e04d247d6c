"""The head that transformers' ``…ForSequenceClassification`` of the architecture puts on its encoder.

A model with it is a plain Hugging Face folder once it is written whole.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import NATIVE, Classifier, Head, head_config
from mergekit_bert.encoder.pretrained import skeleton
from mergekit_bert.hardware import default_device


class NativeClassifier(Classifier):
    """A transformers model for sequence classification."""

    every_token = False
    sequences = 1
    head_prefix = "shell."

    def __init__(self, shell: Any) -> None:
        """``shell`` is the transformers model."""
        super().__init__()
        self.shell = shell
        self.encoder_prefix = f"shell.{shell.base_model_prefix}."

    @property
    def encoder(self) -> nn.Module:
        """The encoder's module tree."""
        model: nn.Module = self.shell.base_model
        return model

    def features(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "rows features"]:
        """The first token of each row."""
        return states[:, 0]

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs (rows, outputs): logits, or a value on 0…1."""
        logits: Tensor = self.shell(**inputs).logits
        return logits


def native_prefix(config: Any, task: Task) -> str:
    """How the names of the encoder's weights begin in transformers' model for sequence classification."""
    return RECORD.prefix(RECORD.over(config, task, nn.Identity()))


class _Native(Head):
    name = NATIVE
    description = "transformers' classification head of the architecture, texts together"
    source = "transformers, AutoModelForSequenceClassification"
    every_token = False
    is_native = True

    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        shell = skeleton(head_config(config, task))
        setattr(shell, shell.base_model_prefix, under)
        for name, module in shell.named_children():
            if name != shell.base_model_prefix:
                module.to_empty(device=default_device())
        return NativeClassifier(shell)

    def output_layer(self, model: Classifier) -> nn.Linear:
        return [module for module in model.head_modules().values() if isinstance(module, nn.Linear)][-1]

    def prefix(self, model: Classifier) -> str:
        return model.encoder_prefix.removeprefix(model.head_prefix)

    def write_config(self, folder: Path, model: Classifier, encoder: nn.Module, task: Task) -> None:
        assert isinstance(model, NativeClassifier)
        config = model.shell.config
        config.architectures, config.dtype = [type(model.shell).__name__], "float32"
        config.save_pretrained(folder)


RECORD = _Native()
