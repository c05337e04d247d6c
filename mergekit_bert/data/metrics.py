"""Metrics: from a model's outputs and the true labels to one figure.

Outputs are ``(rows, labels)`` logits of a classification, or ``(rows, 1)`` values of a regression.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from mergekit_bert.registry import unknown

Column = Shaped[np.ndarray, "rows"]


@dataclass(frozen=True)
class Metric:
    """One metric: ``value(true, predicted)``, its task kind, and its chance value where that is fixed."""

    name: str
    kind: str
    value: Callable[[Column, Column], float]
    correlation: bool = False


def _accuracy(true: Column, predicted: Column) -> float:
    return float((true == predicted).mean())


def _confusion(true: Column, predicted: Column) -> Float[np.ndarray, "labels labels"]:
    true, predicted = true.astype(np.int64), predicted.astype(np.int64)
    size = int(max(true.max(), predicted.max())) + 1
    counts = np.bincount(true * size + predicted, minlength=size * size)
    return counts.reshape(size, size).astype(np.float64)


def _macro_f1(true: Column, predicted: Column) -> float:
    """Mean of the F1 of every label that occurs, in truth or as prediction (as scikit-learn computes it)."""
    counts = _confusion(true, predicted)
    support = counts.sum(0) + counts.sum(1)
    return float((2 * counts.diagonal()[support > 0] / support[support > 0]).mean())


def _matthews(true: Column, predicted: Column) -> float:
    """Multi-class Matthews correlation (Gorodkin 2004); 0 where it is undefined."""
    counts = _confusion(true, predicted)
    total, right = counts.sum(), counts.trace()
    said, real = counts.sum(0), counts.sum(1)
    spread = np.sqrt((total**2 - said @ said) * (total**2 - real @ real))
    return float((right * total - said @ real) / spread) if spread > 0 else 0.0


def _correlation(method: Callable[..., tuple[float, float]]) -> Callable[[Column, Column], float]:
    def value(true: Column, predicted: Column) -> float:
        if np.ptp(true) == 0 or np.ptp(predicted) == 0:  # a constant predicts nothing
            return 0.0
        return float(method(true, predicted)[0])

    return value


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classify", _accuracy),
        Metric("f1", "classify", _macro_f1),
        Metric("matthews", "classify", _matthews, correlation=True),
        Metric("pearson", "regress", _correlation(stats.pearsonr), correlation=True),
        Metric("spearman", "regress", _correlation(stats.spearmanr), correlation=True),
    )
}


def metric(name: str) -> Metric:
    """The metric called ``name``; raises :class:`~mergekit_bert.errors.UnknownNameError`."""
    if name not in METRICS:
        raise unknown("metric", name, sorted(METRICS))
    return METRICS[name]


def predicted_column(kind: str, outputs: Float[np.ndarray, "rows out"]) -> Column:
    """What a metric compares with the labels: the best label's index, or the value."""
    return outputs.argmax(1) if kind == "classify" else outputs[:, 0].astype(np.float64)


def on_unit_scale(name: str, value: float) -> float:
    """A figure on the scale of an accuracy: a correlation ``r`` counts as ``(r + 1) / 2``, all else as it is."""
    return (value + 1) / 2 if metric(name).correlation else value


def overall_score(figures: Iterable[tuple[str, float]]) -> float:
    """The mean of the figures of several tasks, each with the name of its metric, on the scale of an accuracy.

    For sst, para and sts it is the overall score of the field, (sst + para + (sts + 1) / 2) / 3.
    """
    return fmean(on_unit_scale(name, value) for name, value in figures)
