"""A linear layer on the mean of the last layer's tokens, texts together (Reimers & Gurevych 2019, arXiv 1908.10084)."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.pooled import Linear, PooledClassifier, PooledHead


class _FromMean(Linear):
    def forward(self, x: Float[Tensor, "rows 1 width"]) -> Float[Tensor, "rows outputs"]:
        return super().forward(x[:, 0])


class _Mean(PooledHead):
    name = "mean"
    description = "mean of the last layer's tokens into a linear layer, texts together"
    source = "arXiv 1908.10084"

    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        return PooledClassifier(under, self.name, _FromMean(config.hidden_size, task.outputs), 1)


RECORD = _Mean()
