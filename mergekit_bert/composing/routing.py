"""Routing: rows of many tasks in one batch, each through its own adapter and head, over one frozen encoder.

The wide products are done once for all rows; what differs is thin. Rows are put in the order of their adapters, so
that each adapter is one slice. The answer of a row does not depend on its company.
"""

import copy
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.adapter import Part
from mergekit_bert.adapters.attach import attach_routed
from mergekit_bert.data.batches import Tokens
from mergekit_bert.encoder.forward import encode
from mergekit_bert.encoder.heads import Classifier, classifier
from mergekit_bert.encoder.load import Encoder

_FEATURES: ContextVar[Any] = ContextVar("features")


class _Features(nn.Module):
    """Stands in for the encoder under a head: its outputs are those of the forward pass under way."""

    def forward(self, *_: Any, **__: Any) -> Any:
        return _FEATURES.get()


class Mixture:
    """Answers batches in which the rows of many parts meet. Threads may share one."""

    def __init__(self, encoder: Encoder, parts: Sequence[Part]) -> None:
        """Put all ``parts`` beside one tree; rows name theirs by its place in ``parts``."""
        self.tree = attach_routed(encoder, parts)
        self.heads = [_bare(classifier(encoder, part.task, part.head)) for part in parts]

    def outputs(self, tokens: Tokens, owners: Sequence[int]) -> list[Float[np.ndarray, "out"]]:
        """What its own head gives for each row of ``tokens``; ``owners`` are the rows' parts."""
        found: list[Any] = [None] * len(tokens)
        order = sorted(range(len(tokens)), key=lambda row: (owners[row], -tokens.length(row)))
        with torch.inference_mode():
            for index in tokens.cut(order):
                batch = tokens.batch(index)
                features = encode(self.tree, batch, tuple(owners[row] for row in index))
                for owner, places in _runs([owners[row] for row in index]):
                    values = self._head(owner, features, places)
                    for place, value in zip(range(places.start, places.stop), values.numpy(force=True), strict=True):
                        found[index[place]] = value
        return found

    def _head(self, owner: int, features: Any, places: slice) -> Float[Tensor, "rows out"]:
        """The head of ``owner`` on some rows of the encoder's outputs."""
        own = copy.copy(features)
        for name, value in features.items():
            own[name] = value[places]
        token = _FEATURES.set(own)
        try:
            ids = torch.zeros(places.stop - places.start, 1, dtype=torch.long, device=own[0].device)
            logits: Tensor = self.heads[owner](input_ids=ids)
            return logits
        finally:
            _FEATURES.reset(token)


def _runs(owners: Sequence[int]) -> list[tuple[int, slice]]:
    """Runs of equal owners: (owner, places)."""
    starts = [place for place, owner in enumerate(owners) if place == 0 or owners[place - 1] != owner]
    return [(owners[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(owners)], strict=True)]


def _bare(model: Classifier) -> Classifier:
    """The head alone: its encoder is not its own any more."""
    setattr(model.shell, model.shell.base_model_prefix, _Features())
    return model
