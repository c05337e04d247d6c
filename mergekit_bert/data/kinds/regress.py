"""Regression: a value in a range. The head gives it on 0…1, trained by the squared error.

Of a foreign model's task the range may be unknown: its head then gives the value itself.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergekit_bert.data.kind import Example, HubFields, Kind, Label, LabelError, Prediction, TaskFields
from mergekit_bert.data.metric import Columns, metric

_FARTHEST, _NARROWEST = 1e9, 1e-6
"""The ends of a range, and how far apart they must be for a head's float32."""


def _bounds(task: TaskFields) -> tuple[float, float]:
    low, high = task.range or (-_FARTHEST, _FARTHEST)
    return low, high


class _Regress(Kind):
    name = "regress"
    description = "a value in a range"
    example = Example(
        {"range": (-2.0, 3.0), "metrics": ("pearson",)},
        cells=("-2", 3, 0.5, "1.25"),
        refused=("-2.1", "x", None, True, math.nan, 10**400),
    )
    metrics = ("pearson", "spearman")
    has_entropy = False
    has_probability = False
    required: ClassVar = {"range": "[low, high] with low < high"}

    def problem(self, task: TaskFields) -> tuple[str, object, str] | None:
        low, high = _bounds(task)
        if not (-_FARTHEST <= low < high <= _FARTHEST and high - low >= _NARROWEST):
            return "range", task.range, f"[low, high] with low < high, within ±{_FARTHEST:g}"
        if task.labels or task.label_names:
            return "labels", [*task.labels, *task.label_names], "no labels: a regression has a range"
        if task.thresholds:
            return "thresholds", list(task.thresholds), "no thresholds: a regression has a range"
        return None

    def summary(self, task: TaskFields) -> str:
        low, high = _bounds(task)
        return f"{low:g} to {high:g}" if task.range else "a value"

    def output_names(self, task: TaskFields) -> tuple[str, ...]:
        return ("",)

    def parse(self, task: TaskFields, cell: Any) -> float:
        low, high = _bounds(task)
        try:
            number = math.nan if isinstance(cell, bool) or "_" in str(cell) else float(cell)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not low <= number <= high:
            raise LabelError(f"a number from {low:g} to {high:g}")
        return number

    def cell(self, task: TaskFields, label: Label) -> float:
        return label if isinstance(label, int | float) else math.nan

    def targets(self, task: TaskFields, labels: Sequence[Label]) -> Float[Tensor, "rows"]:
        factor, offset = self.stretch(task)
        return (torch.tensor(labels, dtype=torch.float32) - offset) / factor

    def weights(self, task: TaskFields, labels: Sequence[Label]) -> None:
        return None

    def loss(
        self,
        task: TaskFields,
        outputs: Float[Tensor, "rows outputs"],
        targets: Float[Tensor, "rows"],
        weights: Float[Tensor, "outputs"] | None = None,
    ) -> Float[Tensor, ""]:
        return functional.mse_loss(outputs[:, 0], targets)

    def distance(
        self,
        task: TaskFields,
        found: Float[Tensor, "rows outputs"],
        truth: Float[Tensor, "rows outputs"],
        spread: float,
    ) -> Float[Tensor, ""]:
        """The mean squared difference in units of ``spread``."""
        return functional.mse_loss(found, truth) / spread

    def expected_loss(
        self, task: TaskFields, alone: Float[Tensor, "rows outputs"], beside: Float[Tensor, "rows outputs"]
    ) -> float:
        """``1 − r``, the correlation of both."""
        return 1 - metric("pearson").value(alone.double().numpy()[:, 0], beside.double().numpy()[:, 0])

    def directions(
        self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]
    ) -> list[Float[Tensor, "rows outputs"]]:
        """``E[s sᵀ] = 1`` for a Gaussian of unit variance."""
        return [torch.ones_like(outputs)]

    def stretch(self, task: TaskFields) -> tuple[float, float]:
        if task.range is None:
            return 1.0, 0.0
        low, high = task.range
        return high - low, low

    def predicted(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> Columns:
        return outputs[:, 0].astype(np.float64)

    def decode(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> list[Prediction]:
        kept = np.clip(outputs[:, 0], *_bounds(task))
        return [
            Prediction(f"{value:.4f}", f"{value:.4f}", float(value), (float(raw),))
            for value, raw in zip(kept, outputs[:, 0], strict=True)
        ]

    def to_hub(self, task: TaskFields) -> HubFields:
        return HubFields({0: task.name}, "regression")

    def from_hub(self, fields: HubFields) -> dict[str, Any] | None:
        return {} if fields.problem_type in ("", "regression") and len(fields.id2label) == 1 else None


RECORD = _Regress()
