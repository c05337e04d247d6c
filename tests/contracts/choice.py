"""A kind of task and a head for it, as another package would add them: which of several texts is the right one."""

from typing import Any

import torch
from torch import Tensor, nn

import mergekit_bert as mb
from mergekit_bert.data.kind import KINDS, Example, TaskFields
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.pooled import Linear, PooledClassifier, PooledHead

Classify: Any = type(KINDS.get("classify"))


class Choice(Classify):
    name = "choice"
    description = "which of several texts is the right one"
    texts = (2, 9)
    example = Example(
        {"text": ("one", "two", "three"), "labels": ("1", "2", "3"), "metrics": ("accuracy",)},
        cells=("1", 2, 3.0),
        refused=("0", "4", None),
        head="choice-score",
    )
    metrics = ("accuracy",)

    def problem(self, task: TaskFields) -> tuple[str, object, str] | None:
        if len(task.labels) != len(task.text):
            return "labels", list(task.labels), "a label for each text"
        found: tuple[str, object, str] | None = super().problem(task)
        return found

    def from_hub(self, fields: object) -> None:
        return None


class Scores(Linear):
    def forward(self, means: Tensor) -> Tensor:  # (rows, texts, width)
        return torch.cat([super(Scores, self).forward(mean) for mean in means.unbind(1)], 1)


class Score(PooledHead):
    name = "choice-score"
    description = "a score of the mean of each text, texts apart"
    source = "a test"
    apart = True

    def over(self, config: Any, task: Task, under: nn.Module) -> Classifier:
        return PooledClassifier(under, self.name, Scores(config.hidden_size, 1), len(task.text))


mb.register(Score())
mb.register(Choice())
