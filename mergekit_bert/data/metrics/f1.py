"""Macro F1: the mean of the F1 of every label that occurs, in truth or as prediction (as scikit-learn computes it)."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values
from mergekit_bert.data.metrics._counts import confusion, mean_f1


def _macro_f1(true: Columns, predicted: Columns) -> Values:
    counts = confusion(true, predicted)
    return mean_f1(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1) + counts.sum(-2))


RECORD = Metric("f1", _macro_f1)
