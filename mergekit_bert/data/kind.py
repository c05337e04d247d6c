"""What a kind of task is: from a label cell to targets and a loss, and from outputs to predictions.

Everything that differs between classification, regression and other kinds is said here, once for each kind, in one
file of :mod:`mergekit_bert.data.kinds`; no other module asks which kind a task is of.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mergekit_bert.data.metric import Columns, Metric
from mergekit_bert.registry import Registry

MOST_LABELS = 10_000
Label = float | tuple[int, ...]
"""A label as rows hold it: an index, a value, or for every label of the task whether the row has it (1 or 0)."""


class LabelError(ValueError):
    """A label cell that a task does not allow; ``expected`` is what it does."""

    def __init__(self, expected: str) -> None:
        """``expected`` is for a message."""
        super().__init__(expected)
        self.expected = expected


@dataclass(frozen=True, repr=False)
class Prediction:
    """The answer for one row.

    ``label`` is the label as it stands in the data (a regression's value as text, several labels joined by ``|``),
    ``name`` how a person reads it. ``value`` is the label's probability, or the regression's value inside the task's
    range. ``outputs`` is what the head gave: logits, or the value before it was kept in range. ``probability`` is
    that of the label, None where a kind has none.
    """

    label: str
    name: str
    value: float
    outputs: tuple[float, ...]
    probability: float | None = None

    def __repr__(self) -> str:
        """The label and its probability."""
        more = "" if self.probability is None else f", probability={self.probability:.4f}"
        return f"Prediction(label={self.label!r}{more})"


@runtime_checkable
class TaskFields(Protocol):
    """What a kind reads of a task."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def kind(self) -> str:
        """The name of its kind."""

    @property
    def text(self) -> Sequence[str]:
        """The columns of its texts."""

    @property
    def labels(self) -> Sequence[str]:
        """Labels as they stand in the data."""

    @property
    def label_names(self) -> Sequence[str]:
        """Labels as a person reads them; empty: as they stand."""

    @property
    def range(self) -> Sequence[float] | None:
        """Bounds of a value."""

    @property
    def thresholds(self) -> Sequence[float]:
        """The probability from which a row has each label; empty: 0.5."""


@dataclass(frozen=True)
class HubFields:
    """What a transformers configuration says of a task: a name for every output, ``problem_type``, and ``more``.

    A kind may write further fields, ``more``. When a configuration is read, ``more`` is all of it as it stands in the
    JSON: whoever wrote it is not trusted, and of its values only ``id2label`` and ``problem_type`` have been checked.
    """

    id2label: Mapping[int, str]
    problem_type: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A small task of a kind, on which tests/contracts tries whatever every kind keeps to.

    ``fields`` are those of the task beside its name and kind (one column of text where they name none); ``cells`` are
    labels as they may stand in the data, ``refused`` some that may not; ``head`` is one that answers the task.
    """

    fields: Mapping[str, Any]
    cells: tuple[Any, ...]
    refused: tuple[Any, ...]
    head: str = "native"


class Kind(ABC):
    """A kind of task. Subclasses have no state; outputs have shape (rows, outputs)."""

    name: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[Example]
    metrics: ClassVar[tuple[str, ...]]
    """The metrics that fit it, first the one for a task that names none."""
    texts: ClassVar[tuple[int, int]] = (1, 2)
    """The fewest and the most texts of a row."""
    has_entropy: ClassVar[bool] = True
    has_probability: ClassVar[bool] = True
    """Whether a prediction has a probability, which then is its ``value``."""
    required: ClassVar[Mapping[str, str]] = {}
    """Fields that a user's own task must give, with what is expected there, though a task of a foreign model may
    lack them."""

    @abstractmethod
    def problem(self, task: TaskFields) -> tuple[str, object, str] | None:
        """What contradicts itself in a task: (field, found, expected); None if nothing does."""

    def summary(self, task: TaskFields) -> str:
        """What labels a task has, for a listing."""
        return f"{len(task.labels)} classes"

    def output_names(self, task: TaskFields) -> Sequence[str]:
        """What each number is called that the head gives for a row; a lone value has the empty name."""
        return task.labels

    def outputs(self, task: TaskFields) -> int:
        """How many numbers the head gives for a row."""
        return len(self.output_names(task))

    def fits(self, metric: Metric) -> bool:
        """Whether ``metric`` compares what :meth:`truth` and :meth:`predicted` give."""
        return metric.name in self.metrics or self.name in metric.kinds

    def chance(self, task: TaskFields) -> float:
        """What guessing scores on an accuracy or F1."""
        return 1 / max(1, len(task.labels))

    @abstractmethod
    def parse(self, task: TaskFields, cell: Any) -> Label:
        """A label as it stands in the data; raises :class:`LabelError`."""

    @abstractmethod
    def cell(self, task: TaskFields, label: Label) -> str | float:
        """The inverse of :meth:`parse`."""

    @abstractmethod
    def targets(self, task: TaskFields, labels: Sequence[Label]) -> Shaped[Tensor, "rows *each"]:
        """Labels as the loss wants them."""

    @abstractmethod
    def weights(self, task: TaskFields, labels: Sequence[Label]) -> Float[Tensor, "_"] | None:
        """Weights under which all labels count alike in the loss; None where a kind has no such thing."""

    @abstractmethod
    def loss(
        self,
        task: TaskFields,
        outputs: Float[Tensor, "rows outputs"],
        targets: Shaped[Tensor, "rows *each"],
        weights: Float[Tensor, "_"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean loss of the rows; ``weights`` are those of :meth:`weights`."""

    @abstractmethod
    def distance(
        self,
        task: TaskFields,
        found: Float[Tensor, "rows outputs"],
        truth: Float[Tensor, "rows outputs"],
        spread: float,
    ) -> Float[Tensor, ""]:
        """How far outputs are from those of another model; ``spread`` is the variance of ``truth``.

        It is a divergence of the two distributions: 0 at ``truth``, where its curvature is the Fisher information of
        :meth:`directions`. Of a value without one it is the squared difference in units of ``spread``.
        """

    def entropy(self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]) -> Float[Tensor, ""]:
        """Mean entropy of the rows' predictions, in nats; 0 where a kind has none."""
        return outputs.new_zeros(())

    @abstractmethod
    def expected_loss(
        self, task: TaskFields, alone: Float[Tensor, "rows outputs"], beside: Float[Tensor, "rows outputs"]
    ) -> float:
        """The share of its score that a task loses when outputs ``alone`` become ``beside``, were ``alone`` the truth.

        Of labels: the accuracy that ``alone`` expects of the other's answers by its own probabilities, in units of
        what it expects of its own.
        """

    @abstractmethod
    def directions(
        self, task: TaskFields, outputs: Float[Tensor, "rows outputs"]
    ) -> list[Float[Tensor, "rows outputs"]]:
        """``v_k`` with ``Σ v_k v_kᵀ = E[s sᵀ]``, ``s`` the derivative of ``log p(y)`` by the outputs, ``y`` from ``p``.

        So the Fisher information ``E[(∂ log p / ∂W)²] = Σ_k (∂ (v_kᵀ z) / ∂W)²``, exactly.
        """

    def stretch(self, task: TaskFields) -> tuple[float, float]:
        """(factor, offset) from the head's outputs to the task's own units."""
        return 1.0, 0.0

    def truth(self, task: TaskFields, labels: Sequence[Label]) -> Columns:
        """What a metric compares: labels as numbers."""
        return np.asarray(labels, dtype=np.float64)

    @abstractmethod
    def predicted(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> Columns:
        """What a metric compares with the truth, from outputs in the task's own units."""

    @abstractmethod
    def decode(self, task: TaskFields, outputs: Float[np.ndarray, "rows outputs"]) -> list[Prediction]:
        """Outputs in the task's own units as answers."""

    @abstractmethod
    def to_hub(self, task: TaskFields) -> HubFields:
        """What a transformers configuration says of the task; ``id2label`` has a name for every output."""

    def from_hub(self, fields: HubFields) -> Mapping[str, Any] | None:
        """Fields of a task whose configuration has ``fields``, e.g. ``labels``; None for a task of another kind.

        An empty ``problem_type`` is one that nobody wrote: then the number of outputs decides, as in transformers.
        """
        return None


KINDS: Registry[Kind] = Registry(
    "mergekit_bert.data.kinds",
    "kind of task",
    Kind,  # type: ignore[type-abstract]
    "mbert.kinds",
)


def kind_of(task: TaskFields) -> Kind:
    """The kind that ``task`` is of; raises :class:`~mergekit_bert.errors.UnknownNameError`."""
    return KINDS.get(task.kind)


def hub_labels(fields: HubFields) -> tuple[str, ...]:
    """The names in ``id2label`` in the order of the outputs; ``LABEL_0`` … where two are the same."""
    names = tuple(fields.id2label[place] for place in sorted(fields.id2label))
    return names if len(set(names)) == len(names) else numbered(len(names))


def numbered(count: int) -> tuple[str, ...]:
    """``LABEL_0``, ``LABEL_1`` …: what transformers calls the outputs that nobody has named."""
    return tuple(f"LABEL_{place}" for place in range(count))


def balanced(counts: Float[Tensor, "labels"]) -> Float[Tensor, "labels"]:
    """Weights of labels by how often they occur, ``n / (labels · count)``: each label then counts alike."""
    return counts.sum() / (len(counts) * counts.clamp(min=1.0))


def softmax64(logits: Float[np.ndarray, "rows outputs"]) -> Float[np.ndarray, "rows outputs"]:
    """Probabilities of classes in float64."""
    chances: np.ndarray = torch.from_numpy(logits).double().softmax(-1).numpy()
    return chances
