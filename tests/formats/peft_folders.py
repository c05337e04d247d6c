"""PEFT folders as PEFT writes them, and ways to break them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import quiet_transformers

M = "base_model.model."
Q = f"{M}bert.encoder.layer.0.attention.self.query"


def shell(base: Path, task: Task) -> Any:
    """The base under a head, as anybody would load it."""
    with quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=task.outputs, attn_implementation="eager"
        ).eval()


def make(folder: Path, base: Path, task: Task, seed: int = 0, **options: Any) -> Any:
    """A PEFT model with random values wherever it is trained, saved to ``folder``."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="SEQ_CLS", **{"r": 3, "lora_alpha": 5, **options})
        model = peft.get_peft_model(shell(base, task), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return model


def edit(**changes: Any) -> Callable[[Path], None]:
    """New settings in adapter_config.json; None removes one."""

    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        value = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: one for key, one in value.items() if one is not None}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of the weights."""

    def run(path: Path) -> None:
        found = load_file(path / "adapter_model.safetensors")
        change(found)
        save_file(found, path / "adapter_model.safetensors")

    return run


def weights(run: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: run(path / "adapter_model.safetensors")
