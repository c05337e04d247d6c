"""Two texts apart: the cosine of their means, and ``[|u − v|; u · v]``, into a linear layer.

Reimers & Gurevych 2019 (SBERT, arXiv 1908.10084) train classification on ``[u; v; |u − v|]`` and regression on the
cosine; the product is InferSent's (Conneau et al. 2017, arXiv 1705.02364).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.pooled import Linear, PairHead


class _Compare(Linear):
    def forward(self, x: Float[Tensor, "rows 2 width"]) -> Float[Tensor, "rows outputs"]:
        u, v = x.unbind(1)
        cosine = functional.cosine_similarity(u, v)[:, None]
        return super().forward(torch.cat([cosine, (u - v).abs(), u * v], 1))


class _Matching(PairHead):
    name = "matching"
    description = "cosine of the texts' means, |u − v| and u · v into a linear layer, texts apart"
    source = "arXiv 1908.10084"

    def compare(self, config: Any, task: Task) -> nn.Module:
        return _Compare(1 + 2 * config.hidden_size, task.outputs)


RECORD = _Matching()
