"""Routing: rows of several tasks in one batch, each with its own adapter and head, on one frozen encoder.

The products with the frozen weights are computed once for all rows; only the low-rank products differ. Rows are sorted
by adapter, so that each adapter is one slice. The output of a row does not depend on the other rows.
"""

import copy
from collections.abc import Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.attach import attach_routed
from mergekit_bert.adapters.patch import Part
from mergekit_bert.data.batches import Tokens
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import bare_head
from mergekit_bert.encoder.forward import encode
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import EncoderError

_FEATURES: ContextVar[Any] = ContextVar("features")


class _Features(nn.Module):
    """Replaces the encoder below a head and returns the outputs of the current forward pass."""

    def forward(self, *_: Any, **__: Any) -> Any:
        return _FEATURES.get()


class Mixture:
    """Computes outputs for batches with rows of several parts. Threads may share a mixture."""

    def __init__(self, encoder: Encoder, parts: Sequence[Part]) -> None:
        """Attach all ``parts`` to one module tree; rows refer to their part by its index in ``parts``.

        Raises EncoderError if the architecture cannot be packed: DeBERTa passes its positions through the adapted
        layers, so rows of two adapters cannot share them.
        """
        if not packing.enabled(encoder.model):
            raise EncoderError(
                f"base {encoder.name!r}", "an architecture that is not packed", "one that is", "go task by task"
            )
        self.parts = list(parts)
        self.tree = attach_routed(encoder, parts)
        self.heads = [bare_head(encoder.config, part.task, part.head, _Features()) for part in parts]

    def outputs(self, tokens: Tokens, owners: Sequence[int]) -> list[Float[np.ndarray, "out"]]:
        """The outputs of each row's head; ``owners`` has the index of the part of each row of ``tokens``."""
        outputs: list[Any] = [None] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda row: (owners[row], -tokens.length(row)))
        device = next(self.tree.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            for every_token in (False, True):  # the last layer drops tokens, or keeps them
                alike = [row for row in order if self.heads[owners[row]].every_token == every_token]
                for index in tokens.cut(alike):
                    batch, whose = tokens.batch(index), [owners[row] for row in index]
                    features = encode(self.tree, batch, tuple(whose), every_token)
                    ends = [0, *accumulate(batch.counts)]
                    for owner, start, stop in packing.runs(whose):
                        values = self._head(owner, features, slice(ends[start], ends[stop])).numpy(force=True)
                        for row, value in zip(index[start:stop], values, strict=True):
                            outputs[row] = value
        return outputs

    def _head(self, owner: int, features: Any, places: slice) -> Float[Tensor, "rows out"]:
        """The head of ``owner`` on some rows of the encoder's outputs."""
        features_of_rows = copy.copy(features)
        for name, value in features.items():
            # BERT's pooler returns one vector for packed tokens; heads that read all tokens do not use it.
            features_of_rows[name] = value[places] if len(value) == len(features[0]) else value
        token = _FEATURES.set(features_of_rows)
        try:
            ids = torch.zeros(places.stop - places.start, 1, dtype=torch.long, device=features_of_rows[0].device)
            logits: Tensor = self.heads[owner](input_ids=ids)
            return logits
        finally:
            _FEATURES.reset(token)
