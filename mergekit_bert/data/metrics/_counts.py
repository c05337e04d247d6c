"""What several metrics count: confusions of labels, and the mean F1."""

import numpy as np
from jaxtyping import Int, Shaped

from mergekit_bert.data.metric import Columns, Values


def confusion(true: Columns, predicted: Columns) -> Int[np.ndarray, "*samples labels labels"]:
    """How often each label (rows) was predicted as each (columns)."""
    true, predicted = true.astype(np.int64), predicted.astype(np.int64)
    samples, size = true.shape[:-1], int(max(true.max(), predicted.max())) + 1
    sample = np.arange(np.prod(samples, dtype=np.int64)).reshape((*samples, 1))
    cells = (sample * size + true) * size + predicted
    return np.bincount(cells.ravel(), minlength=sample.size * size * size).reshape((*samples, size, size))


def mean_f1(hits: Shaped[np.ndarray, "*samples labels"], support: Shaped[np.ndarray, "*samples labels"]) -> Values:
    """Mean of ``2 hits / support`` over the labels that occur, ``support`` being truths and predictions together."""
    occurs = support > 0
    each = np.where(occurs, 2 * hits / np.maximum(support, 1), 0.0)
    return np.asarray(each.sum(-1) / np.maximum(occurs.sum(-1), 1))
