"""Metrics: from a model's outputs and the true labels to one figure.

Outputs are ``(rows, labels)`` logits of a classification, or ``(rows, 1)`` values of a regression.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from mergekit_bert.errors import PluginError
from mergekit_bert.registry import unknown

Columns = Shaped[np.ndarray, "..."]
"""One value a row, or one for each label of a row: (*samples, rows) or (*samples, rows, labels)."""
Values = Float[np.ndarray, "..."]
"""A figure for each sample of rows."""
Figure = TypeVar("Figure", float, np.ndarray)


@dataclass(frozen=True)
class Metric:
    """One metric: ``of(true, predicted)`` for each sample of rows, and the kinds of task that it fits."""

    name: str
    kinds: tuple[str, ...]
    of: Callable[[Columns, Columns], Values]
    correlation: bool = False

    def value(self, true: Columns, predicted: Columns) -> float:
        """The figure of one sample."""
        return float(self.of(true, predicted))

    def interval(self, true: Columns, predicted: Columns, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % percentile bootstrap over rows (Efron 1979); a single row has no spread."""
        count = len(true)
        if count < 2:
            return self.value(true, predicted), self.value(true, predicted)
        chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
        runs = np.array_split(chosen, -(-chosen.size // _RESAMPLED))  # memory does not grow with the rows
        values = np.concatenate([np.atleast_1d(self.of(true[run], predicted[run])) for run in runs])
        low, high = np.percentile(values, (2.5, 97.5))
        return float(low), float(high)


_RESAMPLED = 2**20
"""Rows of all samples that are scored at once."""


def _accuracy(true: Columns, predicted: Columns) -> Values:
    return np.asarray((true == predicted).mean(-1))


def _confusion(true: Columns, predicted: Columns) -> Int[np.ndarray, "*samples labels labels"]:
    true, predicted = true.astype(np.int64), predicted.astype(np.int64)
    samples, size = true.shape[:-1], int(max(true.max(), predicted.max())) + 1
    sample = np.arange(np.prod(samples, dtype=np.int64)).reshape((*samples, 1))
    cells = (sample * size + true) * size + predicted
    return np.bincount(cells.ravel(), minlength=sample.size * size * size).reshape((*samples, size, size))


def _mean_f1(hits: Shaped[np.ndarray, "*samples labels"], support: Shaped[np.ndarray, "*samples labels"]) -> Values:
    """Mean of ``2 hits / support`` over the labels that occur, ``support`` being truths and predictions together."""
    occurs = support > 0
    each = np.where(occurs, 2 * hits / np.maximum(support, 1), 0.0)
    return np.asarray(each.sum(-1) / np.maximum(occurs.sum(-1), 1))


def _macro_f1(true: Columns, predicted: Columns) -> Values:
    """Mean of the F1 of every label that occurs, in truth or as prediction (as scikit-learn computes it)."""
    counts = _confusion(true, predicted)
    return _mean_f1(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1) + counts.sum(-2))


def _matthews(true: Columns, predicted: Columns) -> Values:
    """Multi-class Matthews correlation (Gorodkin 2004); 0 where it is undefined."""
    counts = _confusion(true, predicted).astype(np.float64)
    said, real = counts.sum(-2), counts.sum(-1)
    total, right = said.sum(-1), np.trace(counts, axis1=-2, axis2=-1)
    spread = np.sqrt((total**2 - (said**2).sum(-1)) * (total**2 - (real**2).sum(-1)))
    above = right * total - (said * real).sum(-1)
    return np.asarray(np.where(spread > 0, above / np.where(spread > 0, spread, 1.0), 0.0))


def _pearson(true: Columns, predicted: Columns) -> Values:
    """Pearson's r; 0 where one side is constant, which predicts nothing."""
    sides = [side.astype(np.float64) for side in (true, predicted)]
    constant = (np.ptp(sides[0], -1) == 0) | (np.ptp(sides[1], -1) == 0)
    one, two = (_unit(side - side.mean(-1, keepdims=True)) for side in sides)
    return np.asarray(np.where(constant, 0.0, np.clip((one * two).sum(-1), -1.0, 1.0)))


def _unit(values: Columns) -> Columns:
    """Each sample's values divided by their norm, scaled first so that no square leaves the range of floats."""
    tiny = np.finfo(np.float64).tiny
    values = values / np.maximum(np.abs(values).max(-1, keepdims=True), tiny)
    unit: np.ndarray = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), tiny)
    return unit


def _spearman(true: Columns, predicted: Columns) -> Values:
    return _pearson(stats.rankdata(true, axis=-1), stats.rankdata(predicted, axis=-1))


def _label_macro_f1(true: Columns, predicted: Columns) -> Values:
    """Mean of the F1 of every label that occurs, each row having any number of labels."""
    return _mean_f1((true * predicted).sum(-2), (true + predicted).sum(-2))


def _label_micro_f1(true: Columns, predicted: Columns) -> Values:
    """The F1 of all labels of all rows together."""
    hits, support = (true * predicted).sum((-1, -2)), (true + predicted).sum((-1, -2))
    return np.asarray(2 * hits / np.maximum(support, 1))


def _exact(true: Columns, predicted: Columns) -> Values:
    """Share of the rows all of whose labels are right."""
    return np.asarray((true == predicted).all(-1).mean(-1))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("classify",), _accuracy),
        Metric("f1", ("classify",), _macro_f1),
        Metric("matthews", ("classify",), _matthews, correlation=True),
        Metric("pearson", ("regress",), _pearson, correlation=True),
        Metric("spearman", ("regress",), _spearman, correlation=True),
        Metric("micro_f1", ("multilabel",), _label_micro_f1),
        Metric("macro_f1", ("multilabel",), _label_macro_f1),
        Metric("exact_match", ("multilabel",), _exact),
    )
}


_OWN = frozenset(METRICS)


def add_metric(metric: Metric) -> Metric:
    """Register the metric of a kind of one's own, and return it; raises PluginError for the name of one of mbert's."""
    if metric.name in _OWN:
        raise PluginError(f"metric {metric.name!r}", "one of that name in mbert", "a new name", "rename it")
    METRICS[metric.name] = metric
    return metric


def metric(name: str) -> Metric:
    """The metric called ``name``; raises :class:`~mergekit_bert.errors.UnknownNameError`."""
    if name not in METRICS:
        raise unknown("metric", name, sorted(METRICS))
    return METRICS[name]


def on_unit_scale(name: str, value: Figure) -> Figure:
    """A figure on the scale of an accuracy: a correlation ``r`` counts as ``(r + 1) / 2``, all else as it is."""
    return (value + 1) / 2 if metric(name).correlation else value


def overall_score(figures: Iterable[tuple[str, Figure]]) -> Figure:
    """The mean of the figures of several tasks on the scale of an accuracy: numbers, or arrays of one shape.

    Each comes with the name of its metric. For sst, para and sts it is the overall score of the field,
    (sst + para + (sts + 1) / 2) / 3.
    """
    scaled = [on_unit_scale(name, value) for name, value in figures]
    total = scaled[0]
    for value in scaled[1:]:
        total = total + value
    return total / len(scaled)
