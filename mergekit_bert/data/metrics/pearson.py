"""Pearson's r; 0 where one side is constant, which predicts nothing."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values


def pearson(true: Columns, predicted: Columns) -> Values:
    """The correlation of both sides in each sample."""
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


RECORD = Metric("pearson", pearson, correlation=True)
