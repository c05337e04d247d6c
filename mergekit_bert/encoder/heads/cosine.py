"""Two texts apart: the cosine of their means, with a scale and an offset for each output.

Reimers & Gurevych 2019 (SBERT, arXiv 1908.10084, section 3) train similarity on the cosine alone.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.pooled import Linear, PairHead


class _Compare(Linear):
    def forward(self, x: Float[Tensor, "rows 2 width"]) -> Float[Tensor, "rows outputs"]:
        u, v = x.unbind(1)
        return super().forward(functional.cosine_similarity(u, v)[:, None])


class _Cosine(PairHead):
    name = "cosine"
    description = "cosine of the texts' means, with a scale and an offset, texts apart"
    source = "arXiv 1908.10084"

    def compare(self, config: Any, task: Task) -> nn.Module:
        return _Compare(1, task.outputs)


RECORD = _Cosine()
