"""Multi-class Matthews correlation (Gorodkin 2004); 0 where it is undefined."""

import numpy as np

from mergekit_bert.data.metric import Columns, Metric, Values
from mergekit_bert.data.metrics._counts import confusion


def _matthews(true: Columns, predicted: Columns) -> Values:
    counts = confusion(true, predicted).astype(np.float64)
    said, real = counts.sum(-2), counts.sum(-1)
    total, right = said.sum(-1), np.trace(counts, axis1=-2, axis2=-1)
    spread = np.sqrt((total**2 - (said**2).sum(-1)) * (total**2 - (real**2).sum(-1)))
    above = right * total - (said * real).sum(-1)
    return np.asarray(np.where(spread > 0, above / np.where(spread > 0, spread, 1.0), 0.0))


RECORD = Metric("matthews", _matthews, correlation=True)
