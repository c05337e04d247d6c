"""Macro F1 of rows with any number of labels: the mean of the F1 of every label that occurs."""

from mergekit_bert.data.metric import Columns, Metric, Values
from mergekit_bert.data.metrics._counts import mean_f1


def _macro_f1(true: Columns, predicted: Columns) -> Values:
    return mean_f1((true * predicted).sum(-2), (true + predicted).sum(-2))


RECORD = Metric("macro_f1", _macro_f1)
