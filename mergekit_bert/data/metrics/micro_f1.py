"""Micro F1 of rows with any number of labels: the F1 of all labels of all rows together."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values


def _micro_f1(true: Columns, predicted: Columns) -> Values:
    hits, support = (true * predicted).sum((-1, -2)), (true + predicted).sum((-1, -2))
    return np.asarray(2 * hits / np.maximum(support, 1))


RECORD = Metric("micro_f1", _micro_f1)
