"""Exact match: the share of the rows all of whose labels are right."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values


def _exact_match(true: Columns, predicted: Columns) -> Values:
    return np.asarray((true == predicted).all(-1).mean(-1))


RECORD = Metric("exact_match", _exact_match)
