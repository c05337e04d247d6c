"""Multi-label classification: any number of labels a row, ``a|b`` in a cell. The head gives a logit for each label."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
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
    hub_labels,
    numbered,
)
from mergekit_bert.data.metric import Columns

SEPARATOR = "|"


class _Multilabel(Kind):
    name = "multilabel"
    description = f"any number of labels, joined by {SEPARATOR!r} in a cell"
    example = Example(
        {"labels": ("x", "y", "z"), "thresholds": (0.5, 0.3, 0.6), "metrics": ("micro_f1",)},
        cells=("x", "", "z|x", "x|y|z"),
        refused=("w", "x|w", "x|x", None),
    )
    metrics = ("micro_f1", "macro_f1", "exact_match")

    def problem(self, task: TaskFields) -> tuple[str, object, str] | None:
        if not MOST_LABELS >= len(set(task.labels)) == len(task.labels) >= 1:
            return "labels", list(task.labels), f"one or more different labels, up to {MOST_LABELS}"
        if odd := [label for label in task.labels if _unfit(label)]:
            return "labels", odd, f"labels without {SEPARATOR!r} and without spaces around them"
        if len(task.label_names) not in (0, len(task.labels)):
            return "label_names", list(task.label_names), "one name for each label"
        if task.range is not None:
            return "range", task.range, "no range: a classification has labels"
        if len(task.thresholds) not in (0, len(task.labels)) or not all(0 < one < 1 for one in task.thresholds):
            return "thresholds", list(task.thresholds), "a probability between 0 and 1 for each label"
        return None

    def summary(self, task: TaskFields) -> str:
        return f"any of {len(task.labels)} labels"

    def parse(self, task: TaskFields, cell: Any) -> tuple[int, ...]:
        """An empty cell is a row without labels."""
        texts = [text for part in str(cell).split(SEPARATOR) if (text := part.strip())] if cell is not None else []
        if cell is None or not set(texts) <= set(task.labels) or len(set(texts)) < len(texts):
            raise LabelError(f"any of {', '.join(task.labels)}, each once, joined by {SEPARATOR!r}")
        return tuple(int(label in texts) for label in task.labels)

    def cell(self, task: TaskFields, label: Label) -> str:
        marks = label if isinstance(label, tuple) else ()
        return SEPARATOR.join(name for name, mark in zip(task.labels, marks, strict=True) if mark)

    def targets(self, task: TaskFields, labels: Sequence[Label]) -> Float[Tensor, "rows outputs"]:
        return torch.tensor(labels, dtype=torch.float32)

    def weights(self, task: TaskFields, labels: Sequence[Label]) -> Float[Tensor, "outputs"]:
        """How much more often a label is absent than present."""
        marks = self.targets(task, labels)
        return (len(marks) - marks.sum(0)).clamp(min=1.0) / marks.sum(0).clamp(min=1.0)

    def loss(
        self,
        task: TaskFields,
        outputs: Float[Tensor, "rows outputs"],
        targets: Float[Tensor, "rows outputs"],
        weights: Float[Tensor, "outputs"] | None = None,
    ) -> Float[Tensor, ""]:
        """The binary cross entropy of each label; ``weights`` multiply that of its presence."""
        return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), pos_weight=weights)

    def distance(
        self,
        task: TaskFields,
        found: Float[Tensor, "rows outputs"],
        truth: Float[Tensor, "rows outputs"],
        spread: float,
    ) -> Float[Tensor, ""]:
        """The Kullback-Leibler divergence of each label's presence, summed over the labels."""
        chances = truth.sigmoid()
        apart = chances * (functional.logsigmoid(truth) - functional.logsigmoid(found))
        apart = apart + (1 - chances) * (functional.logsigmoid(-truth) - functional.logsigmoid(-found))
        return apart.sum(-1).mean()

    def entropy(self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]) -> Float[Tensor, ""]:
        chances = outputs.sigmoid()
        each: Tensor = (torch.special.entr(chances) + torch.special.entr(1 - chances)).sum(-1)
        return each.mean()

    def expected_loss(
        self, task: TaskFields, alone: Float[Tensor, "rows outputs"], beside: Float[Tensor, "rows outputs"]
    ) -> float:
        chances = alone.double().sigmoid()
        own = torch.maximum(chances, 1 - chances)
        other = torch.where(beside >= 0, chances, 1 - chances)
        return float(1 - other.mean() / own.mean())

    def directions(
        self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]
    ) -> list[Float[Tensor, "rows outputs"]]:
        """``E[s sᵀ] = diag(p (1 − p))``: one direction for each label."""
        chances = outputs.sigmoid()
        roots = (chances * (1 - chances)).sqrt()
        return list(roots.diag_embed().unbind(-1))

    def predicted(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> Columns:
        return (_chances(outputs) >= np.asarray(task.thresholds or (0.5,))).astype(np.float64)

    def decode(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> list[Prediction]:
        """``value`` is the probability of the whole answer, labels counted as independent."""
        names, chances = task.label_names or task.labels, _chances(outputs)
        found = []
        for row, marks in enumerate(self.predicted(task, outputs) > 0):
            whole = float(np.where(marks, chances[row], 1 - chances[row]).prod())
            label, name = (
                SEPARATOR.join(text for text, mark in zip(texts, marks, strict=True) if mark)
                for texts in (task.labels, names)
            )
            found.append(Prediction(label, name, whole, tuple(map(float, outputs[row])), whole))
        return found

    def to_hub(self, task: TaskFields) -> HubFields:
        return HubFields(dict(enumerate(task.label_names or task.labels)), "multi_label_classification")

    def from_hub(self, fields: HubFields) -> dict[str, Any] | None:
        """``LABEL_0`` … where the names could not stand in a cell."""
        if fields.problem_type != "multi_label_classification":
            return None
        names = hub_labels(fields)
        return {"labels": numbered(len(names)) if any(map(_unfit, names)) else names}


def _unfit(label: str) -> bool:
    """Whether a cell could not hold ``label`` beside others."""
    return SEPARATOR in label or label.strip() != label or not label


def _chances(outputs: Float[np.ndarray, "rows outputs"]) -> Float[np.ndarray, "rows outputs"]:
    return torch.from_numpy(np.asarray(outputs, dtype=np.float64)).sigmoid().numpy()


RECORD = _Multilabel()
