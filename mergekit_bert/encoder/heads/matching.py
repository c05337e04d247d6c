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
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.pooled import Linear, PooledClassifier, PooledHead
from mergekit_bert.errors import TrainingError


class _Compare(Linear):
    def forward(self, x: Float[Tensor, "rows 2 width"]) -> Float[Tensor, "rows outputs"]:
        u, v = x.unbind(1)
        cosine = functional.cosine_similarity(u, v)[:, None]
        return super().forward(torch.cat([cosine, (u - v).abs(), u * v], 1))


class _Matching(PooledHead):
    name = "matching"
    description = "cosine of the texts' means, |u − v| and u · v into a linear layer, texts apart"
    source = "arXiv 1908.10084"
    apart = True

    def check(self, task: Task) -> None:
        if len(task.text) != 2:
            columns = ", ".join(task.text)
            raise TrainingError(
                "`head=matching`",
                f"task {task.name!r} with the text {columns}",
                "a task with two texts",
                "use `head=mean`",
            )

    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        return PooledClassifier(under, self.name, _Compare(1 + 2 * config.hidden_size, task.outputs), 2)

    def start(self, model: Classifier, task: Task, config: Any, source: torch.Generator) -> None:
        """Like any head's; a single output, a value on 0…1, begins as the cosine."""
        super().start(model, task, config, source)
        if task.outputs == 1:
            with torch.no_grad():
                model.head()[f"{self.name}.linear.weight"][0, 0] = 1.0


RECORD = _Matching()
