"""The forward pass over many rows: the one place where rows become outputs, for training's checks and all else."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.errors import ModelFileError
from mergekit_bert.hardware import autocast

EVAL_BATCH = 64
_TOLERANCE = 1e-4
"""Relative to the largest output."""


def forward_rows(
    model: nn.Module,
    tokens: Tokens,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda rows: None,
) -> Float[np.ndarray, "rows out"]:
    """Outputs of every row, in the rows' order; ``tick`` is told how many rows are done."""
    device = next(model.parameters()).device
    outputs: dict[int, np.ndarray] = {}
    with torch.inference_mode(), autocast(dtype, device):
        for batch in tokens.in_order(EVAL_BATCH):
            values = model(**to_device(batch, device)).float().cpu().numpy()
            outputs.update(zip(batch.index, values, strict=True))
            tick(len(outputs))
    return np.stack([outputs[row] for row in range(len(tokens))])


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """The model inputs of a batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}


def scaled(outputs: Float[np.ndarray, "rows out"], bounds: tuple[float, float] | None) -> Float[np.ndarray, "rows out"]:
    """Outputs in the task's own units: a regression's 0…1 stretched to its range, logits as they are."""
    if bounds is None:
        return outputs
    low, high = bounds
    return low + (high - low) * outputs


def check_same_outputs(where: str, before: Float[np.ndarray, "rows out"], after: Float[np.ndarray, "rows out"]) -> None:
    """Raise ModelFileError where outputs ``after`` a save differ from those ``before`` by more than rounding."""
    worst = float(np.abs(before - after).max() / max(1.0, float(np.abs(before).max())))
    if not worst <= _TOLERANCE:
        raise ModelFileError(
            where,
            f"after saving its outputs differ by {worst:.2g}",
            f"at most {_TOLERANCE:g}",
            "report this as a bug; what was written must not be used",
        )
