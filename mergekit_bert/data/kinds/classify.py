"""Classification: one of several labels. The head gives logits, trained by cross entropy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mergekit_bert.data.kind import (
    MOST_LABELS,
    Example,
    HubFields,
    Kind,
    Label,
    LabelError,
    Prediction,
    TaskFields,
    balanced,
    hub_labels,
    softmax64,
)
from mergekit_bert.data.metric import Columns


class _Classify(Kind):
    name = "classify"
    description = "one of several labels"
    example = Example(
        {"labels": ("no", "yes", "may be"), "metrics": ("accuracy",)},
        cells=("no", "yes", "may be", "yes"),
        refused=("nope", None, "", 1.5),
    )
    metrics = ("accuracy", "f1", "matthews")

    def problem(self, task: TaskFields) -> tuple[str, object, str] | None:
        if not MOST_LABELS >= len(set(task.labels)) == len(task.labels) >= 2:
            return "labels", list(task.labels), f"two or more different labels, up to {MOST_LABELS}"
        if len(task.label_names) not in (0, len(task.labels)):
            return "label_names", list(task.label_names), "one name for each label"
        if task.range is not None:
            return "range", task.range, "no range: a classification has labels"
        if task.thresholds:
            return "thresholds", list(task.thresholds), "no thresholds: the likeliest label is the answer"
        return None

    def parse(self, task: TaskFields, cell: Any) -> float:
        text = str(cell)
        if text not in task.labels and isinstance(cell, float) and cell.is_integer():
            text = str(int(cell))  # Parquet and JSON keep whole labels as 1.0
        if text not in task.labels:
            raise LabelError(f"one of {', '.join(task.labels)}")
        return float(task.labels.index(text))

    def cell(self, task: TaskFields, label: Label) -> str:
        return task.labels[int(label)] if isinstance(label, int | float) else ""

    def targets(self, task: TaskFields, labels: Sequence[Label]) -> Int[Tensor, "rows"]:
        return torch.tensor(labels, dtype=torch.long)

    def weights(self, task: TaskFields, labels: Sequence[Label]) -> Float[Tensor, "outputs"]:
        return balanced(torch.bincount(self.targets(task, labels), minlength=len(task.labels)).float())

    def loss(
        self,
        task: TaskFields,
        outputs: Float[Tensor, "rows outputs"],
        targets: Int[Tensor, "rows"],
        weights: Float[Tensor, "outputs"] | None = None,
    ) -> Float[Tensor, ""]:
        if weights is None:
            return functional.cross_entropy(outputs, targets)
        # Divided by the rows, not by their weights: then parts of a batch add up to the batch.
        return functional.cross_entropy(outputs, targets, weights, reduction="sum") / len(targets)

    def distance(
        self,
        task: TaskFields,
        found: Float[Tensor, "rows outputs"],
        truth: Float[Tensor, "rows outputs"],
        spread: float,
    ) -> Float[Tensor, ""]:
        """The Kullback-Leibler divergence."""
        chances = functional.log_softmax(truth, -1)
        return functional.kl_div(functional.log_softmax(found, -1), chances, reduction="batchmean", log_target=True)

    def entropy(self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]) -> Float[Tensor, ""]:
        each: Tensor = torch.special.entr(outputs.softmax(-1)).sum(-1)
        return each.mean()

    def expected_loss(
        self, task: TaskFields, alone: Float[Tensor, "rows outputs"], beside: Float[Tensor, "rows outputs"]
    ) -> float:
        chances = alone.double().softmax(-1)
        own, other = chances.max(-1).values, chances.gather(-1, beside.argmax(-1, keepdim=True))
        return float(1 - other.mean() / own.mean())

    def directions(
        self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]
    ) -> list[Float[Tensor, "rows outputs"]]:
        """``E[s sᵀ] = diag(p) − p pᵀ``, which is 0 along (1, …, 1) and leaves one fewer than classes."""
        chances = outputs.double().softmax(-1)
        values, vectors = torch.linalg.eigh(chances.diag_embed() - chances[:, :, None] * chances[:, None])
        roots = vectors * values.clamp(min=0).sqrt()[:, None]
        return list(roots.to(outputs.dtype).unbind(-1)[1:])

    def predicted(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> Columns:
        best: np.ndarray = outputs.argmax(1)
        return best

    def decode(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> list[Prediction]:
        names, chances = task.label_names or task.labels, softmax64(outputs)
        return [
            Prediction(task.labels[best], names[best], chance, tuple(map(float, outputs[row])), chance)
            for row, best in enumerate(outputs.argmax(1).tolist())
            for chance in [float(chances[row, best])]
        ]

    def to_hub(self, task: TaskFields) -> HubFields:
        return HubFields(dict(enumerate(task.label_names or task.labels)), "single_label_classification")

    def from_hub(self, fields: HubFields) -> dict[str, Any] | None:
        fits = fields.problem_type in ("", "single_label_classification") and len(fields.id2label) > 1
        return {"labels": hub_labels(fields)} if fits else None


RECORD = _Classify()
