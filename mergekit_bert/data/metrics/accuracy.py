"""Accuracy: the share of the rows whose label is right."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values


def _accuracy(true: Columns, predicted: Columns) -> Values:
    return np.asarray((true == predicted).mean(-1))


RECORD = Metric("accuracy", _accuracy)
