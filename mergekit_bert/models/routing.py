"""Routing: rows of many tasks in one batch, each through its own adapter and head, over one frozen encoder.

The wide products are done once for all rows; what differs is thin. Rows are put in the order of their adapters, so
that each adapter is one slice. The answer of a row does not depend on its company.
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
    """Stands in for the encoder under a head: its outputs are those of the forward pass under way."""

    def forward(self, *_: Any, **__: Any) -> Any:
        return _FEATURES.get()


class Mixture:
    """Answers batches in which the rows of many parts meet. Threads may share one."""

    def __init__(self, encoder: Encoder, parts: Sequence[Part]) -> None:
        """Put all ``parts`` beside one tree; rows name theirs by its place in ``parts``.

        Raises EncoderError where the architecture cannot be packed: DeBERTa puts its positions through the adapted
        layers, so that rows of two adapters cannot share them.
        """
        if not packing.enabled(encoder.model):
            raise EncoderError(
                f"base {encoder.name!r}", "an architecture that is not packed", "one that is", "go task by task"
            )
        self.parts = list(parts)
        self.tree = attach_routed(encoder, parts)
        self.heads = [bare_head(encoder.config, part.task, part.head, _Features()) for part in parts]

    def outputs(self, tokens: Tokens, owners: Sequence[int]) -> list[Float[np.ndarray, "out"]]:
        """What its own head gives for each row of ``tokens``; ``owners`` are the rows' parts."""
        found: list[Any] = [None] * len(tokens)
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
                            found[row] = value
        return found

    def _head(self, owner: int, features: Any, places: slice) -> Float[Tensor, "rows out"]:
        """The head of ``owner`` on some rows of the encoder's outputs."""
        own = copy.copy(features)
        for name, value in features.items():
            # BERT's pooler makes one vector of packed tokens; who reads all of them does not read it.
            own[name] = value[places] if len(value) == len(features[0]) else value
        token = _FEATURES.set(own)
        try:
            ids = torch.zeros(places.stop - places.start, 1, dtype=torch.long, device=own[0].device)
            logits: Tensor = self.heads[owner](input_ids=ids)
            return logits
        finally:
            _FEATURES.reset(token)
