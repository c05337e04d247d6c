"""What a metric is: from the true and the predicted labels to one figure.

Each stands in one file of :mod:`mergekit_bert.data.metrics`. A kind of task names those that fit it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Shaped

from mergekit_bert.registry import Registry

Columns = Shaped[np.ndarray, "..."]
"""One value a row, or one for each label of a row: (*samples, rows) or (*samples, rows, labels)."""
Values = Float[np.ndarray, "..."]
"""A figure for each sample of rows."""
Figure = TypeVar("Figure", float, np.ndarray)


@dataclass(frozen=True)
class Metric:
    """One metric: ``of(true, predicted)`` for each sample of rows. Higher is better: an error counts as its negative.

    ``kinds`` are kinds of task that it fits although they do not name it, for a metric that is added to a kind of
    another package.
    """

    name: str
    of: Callable[[Columns, Columns], Values]
    correlation: bool = False
    kinds: tuple[str, ...] = ()

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


METRICS: Registry[Metric] = Registry("mergekit_bert.data.metrics", "metric", Metric, "mbert.metrics")


def metric(name: str) -> Metric:
    """The metric called ``name``; raises :class:`~mergekit_bert.errors.UnknownNameError`."""
    return METRICS.get(name)


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
