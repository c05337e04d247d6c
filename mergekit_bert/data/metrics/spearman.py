"""Spearman's rank correlation: Pearson's r of the ranks, equal values sharing the mean of theirs."""

from scipy import stats

from mergekit_bert.data.metric import Columns, Metric, Values
from mergekit_bert.data.metrics.pearson import pearson


def _spearman(true: Columns, predicted: Columns) -> Values:
    return pearson(stats.rankdata(true, axis=-1), stats.rankdata(predicted, axis=-1))


RECORD = Metric("spearman", _spearman, correlation=True)
