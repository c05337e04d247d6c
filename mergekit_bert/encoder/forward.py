"""The forward pass over many rows, used for all predictions, scores and checks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.errors import EncoderError, ModelFileError
from mergekit_bert.hardware import autocast

_TOLERANCE = 1e-4
"""Relative to the largest output."""


def forward_rows(
    model: Classifier,
    tokens: Tokens,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda rows: None,
) -> Float[np.ndarray, "rows out"]:
    """Outputs of every row, in the rows' order; ``tick`` is called with the number of finished rows."""
    device = next(model.parameters()).device
    outputs: dict[int, np.ndarray] = {}
    with torch.inference_mode(), autocast(dtype, device):
        for batch in tokens.in_order():
            values = outputs_of(model, batch).float().cpu().numpy()
            outputs.update(zip(batch.index, values, strict=True))
            tick(len(outputs))
    return np.stack([outputs[row] for row in range(len(tokens))])


def outputs_of(model: Classifier, batch: Batch) -> Float[Tensor, "rows out"]:
    """Outputs of the rows of ``batch``."""
    outputs: Tensor = _run(model, model.encoder, batch, (), model.every_token)
    return outputs


def embed_rows(model: Classifier, tokens: Tokens) -> Float[np.ndarray, "sequences width"]:
    """The mean of the last hidden states of every sequence, row by row: the input of a head that reads all tokens."""
    vectors: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for batch in tokens.in_order():
            means = encode(model.encoder, batch, every_token=True)["last_hidden_state"][:, 0]
            parts = np.split(means.float().cpu().numpy(), np.cumsum(batch.counts)[:-1])
            vectors.update(zip(batch.index, parts, strict=True))
    return np.concatenate([vectors[row] for row in range(len(tokens))])


def padded_outputs(model: Classifier, tokens: Tokens) -> Float[np.ndarray, "rows out"]:
    """Outputs of every row computed by transformers with padding, to check packed ones."""
    device, batch = next(model.parameters()).device, tokens.batch(list(range(len(tokens))))
    _check_tokens(model.encoder, batch)
    with torch.inference_mode():
        inputs = {name: tensor.to(device) for name, tensor in batch.padded().items()}
        outputs: np.ndarray = model(**inputs).float().cpu().numpy()
    return outputs


def encode(encoder: nn.Module, batch: Batch, adapters: tuple[int, ...] = (), every_token: bool = False) -> Any:
    """The encoder's outputs for the sequences of ``batch``, as input of a head.

    ``adapters`` are the numbers of the rows' adapters, in rising order. ``every_token``: the last state of a sequence
    is the mean of its tokens, ``(sequences, 1, width)``.
    """
    counts = batch.counts if adapters else ()
    owners = tuple(owner for owner, count in zip(adapters, counts, strict=True) for _ in range(count))
    found = _run(encoder, encoder, batch, owners, every_token)
    if every_token:
        with packing.laid_out(packing.Layout(batch.lengths, found[0].device)):
            found["last_hidden_state"] = packing.mean(found[0])[:, None]
    return found


def _run(model: nn.Module, encoder: nn.Module, batch: Batch, adapters: tuple[int, ...], every_token: bool) -> Any:
    """Run ``model`` without padding if the architecture allows it."""
    _check_tokens(encoder, batch)
    device = next(model.parameters()).device
    layout = packing.Layout(batch.lengths, device, adapters, every_token)
    with packing.laid_out(layout):
        if not packing.enabled(encoder):
            return model(**{name: tensor.to(device) for name, tensor in batch.padded().items()})
        inputs = {name: tensor.to(device)[None] for name, tensor in batch.inputs.items()}
        positions = packing.position_ids(encoder, inputs["input_ids"][0], layout)
        return model(**inputs, position_ids=positions[None])


def _check_tokens(encoder: Any, batch: Batch) -> None:
    """Raise EncoderError for a token without an embedding, because the tokenizer belongs to another model."""
    sizes = {
        "input_ids": encoder.get_input_embeddings().num_embeddings,
        "token_type_ids": getattr(encoder.config, "type_vocab_size", 0),
    }
    for name, values in batch.inputs.items():
        largest = int(values.max()) if values.numel() else -1
        if 0 < sizes.get(name, 0) <= largest:
            expected = f"numbers below {sizes[name]}, as the model has embeddings"
            raise EncoderError("tokenizer", f"{largest} in {name}", expected, "restore the model's tokenizer")


def scaled(outputs: Float[np.ndarray, "rows out"], task: Task) -> Float[np.ndarray, "rows out"]:
    """Outputs in the task's own units: a regression's 0…1 stretched to its range, logits as they are."""
    factor, offset = kind_of(task).stretch(task)
    return outputs if (factor, offset) == (1.0, 0.0) else offset + factor * outputs


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
