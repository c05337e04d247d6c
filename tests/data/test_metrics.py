"""Metrics against plain references: counted one by one, or as scipy and the textbook define them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mergekit_bert.data.kind import KINDS
from mergekit_bert.data.metric import METRICS, metric, on_unit_scale, overall_score
from mergekit_bert.errors import UnknownNameError

Pair = tuple[np.ndarray, np.ndarray]


@st.composite
def labelled(draw: st.DrawFn, classes: int = 4) -> Pair:
    size = draw(st.integers(1, 25))
    column = arrays.arrays(np.int64, size, elements=st.integers(0, classes - 1))
    return draw(column), draw(column)


@st.composite
def valued(draw: st.DrawFn) -> Pair:
    size = draw(st.integers(3, 25))
    column = arrays.arrays(np.float64, size, elements=st.integers(-40, 40).map(lambda n: n / 8))
    return draw(column), draw(column)


def value(name: str, pair: Pair) -> float:
    return metric(name).value(*pair)


def plain_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    scores = []
    for label in {*true.tolist(), *predicted.tolist()}:
        hits = sum(t == label == p for t, p in zip(true, predicted, strict=True))
        said, real = sum(p == label for p in predicted), sum(t == label for t in true)
        precision, recall = hits / said if said else 0.0, hits / real if real else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


def plain_matthews(true: np.ndarray, predicted: np.ndarray) -> float:
    """The correlation of the two one-hot tables (Gorodkin 2004), from their covariances."""
    size = max(true.max(), predicted.max()) + 1
    one, two = np.eye(size)[true], np.eye(size)[predicted]
    one, two = one - one.mean(0), two - two.mean(0)
    spread = math.sqrt((one * one).sum() * (two * two).sum())
    return float((one * two).sum() / spread) if spread > 1e-12 else 0.0


def plain_pearson(true: np.ndarray, predicted: np.ndarray) -> float:
    if len(set(true.tolist())) == 1 or len(set(predicted.tolist())) == 1:
        return 0.0
    return float(np.corrcoef(true, predicted)[0, 1])


def plain_label_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """The mean over the labels that occur at all."""
    found = [
        sklearn.f1_score(true[:, label], predicted[:, label], zero_division=0)
        for label in range(true.shape[1])
        if true[:, label].any() or predicted[:, label].any()
    ]
    return float(np.mean(found)) if found else 0.0


def plain_ranks(column: np.ndarray) -> np.ndarray:
    return np.array([(column < one).sum() + ((column == one).sum() + 1) / 2 for one in column])


PLAIN: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda true, predicted: sum(t == p for t, p in zip(true, predicted, strict=True)) / len(true),
    "f1": plain_f1,
    "matthews": plain_matthews,
    "pearson": plain_pearson,
    "spearman": lambda true, predicted: plain_pearson(plain_ranks(true), plain_ranks(predicted)),
    "micro_f1": lambda true, predicted: sklearn.f1_score(true, predicted, average="micro", zero_division=0),
    "macro_f1": lambda true, predicted: plain_label_f1(true, predicted),
    "exact_match": sklearn.accuracy_score,
}


def test_every_metric_has_its_reference() -> None:
    assert set(PLAIN) == set(METRICS.names())


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
@settings(deadline=None)
@given(pair=labelled())
def test_a_classification_metric_is_what_counting_gives(name: str, pair: Pair) -> None:
    assert value(name, pair) == pytest.approx(PLAIN[name](*pair), abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@settings(deadline=None)
@given(pair=valued())
def test_a_correlation_is_what_the_definition_gives(name: str, pair: Pair) -> None:
    assert value(name, pair) == pytest.approx(PLAIN[name](*pair), abs=1e-9)


@pytest.mark.parametrize("name", ["micro_f1", "macro_f1", "exact_match"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_metric_of_several_labels_is_what_scikit_learn_gives(name: str, data: st.DataObject) -> None:
    marks = arrays.arrays(np.float64, data.draw(arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=9)),
                          elements=st.sampled_from([0.0, 1.0]))  # fmt: skip
    true = data.draw(marks)
    predicted = data.draw(arrays.arrays(np.float64, true.shape, elements=st.sampled_from([0.0, 1.0])))
    assert value(name, (true, predicted)) == pytest.approx(PLAIN[name](true, predicted), abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
@settings(deadline=None, max_examples=40)
@given(pair=labelled())
def test_a_classification_metric_is_what_scikit_learn_gives(name: str, pair: Pair) -> None:
    theirs = {
        "accuracy": sklearn.accuracy_score,
        "f1": lambda true, predicted: sklearn.f1_score(true, predicted, average="macro"),
        "matthews": sklearn.matthews_corrcoef,
    }[name]
    assert value(name, pair) == pytest.approx(theirs(*pair), abs=1e-12)


def columns(name: str, rows: int) -> Pair:
    source = np.random.default_rng(3)
    if name in KINDS.get("regress").metrics:
        true = source.normal(size=rows)
        return true, true + source.normal(size=rows)
    shape = (rows, 3) if name in KINDS.get("multilabel").metrics else rows
    true = source.integers(0, 2, shape)
    return true, np.where(source.random(shape) < 0.7, true, source.integers(0, 2, shape))


@pytest.mark.parametrize("name", METRICS.names())
def test_many_samples_at_once_are_scored_as_each_alone(name: str) -> None:
    true, predicted = columns(name, 40)
    chosen = np.random.default_rng(5).integers(0, 40, (2, 7, 40))
    together = metric(name).of(true[chosen], predicted[chosen])
    alone = [[metric(name).value(true[index], predicted[index]) for index in row] for row in chosen]
    np.testing.assert_allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_an_interval_is_scipys_bootstrap(name: str) -> None:
    true, predicted = columns(name, 60)
    theirs = scipy.stats.bootstrap(
        (true, predicted), metric(name).value, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval  # fmt: skip
    assert metric(name).interval(true, predicted) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_labels_may_come_as_floats(name: str) -> None:
    true, predicted = np.array([0.0, 1.0, 2.0, 1.0]), np.array([0, 1, 1, 1])
    assert value(name, (true, predicted)) == value(name, (true.astype(np.int64), predicted))


@pytest.mark.parametrize("name", ["f1", "matthews"])
@settings(deadline=None)
@given(pair=labelled(3))
def test_naming_the_labels_otherwise_changes_nothing(name: str, pair: Pair) -> None:
    other = np.array([7, 2, 4])
    assert value(name, (other[pair[0]], other[pair[1]])) == pytest.approx(value(name, pair), abs=1e-12)


KNOWN = [
    ("accuracy", [0, 1, 1, 0], [0, 1, 0, 0], 0.75),
    ("f1", [0, 1, 1, 0], [0, 1, 0, 0], (0.8 + 2 / 3) / 2),
    ("f1", [2, 2], [2, 2], 1.0),
    ("f1", [0, 0], [1, 1], 0.0),
    ("f1", [0, 0, 0, 1], [0, 0, 0, 0], (6 / 7) / 2),
    ("matthews", [0, 1, 0, 1], [1, 0, 1, 0], -1.0),
    ("matthews", [0, 1, 2], [0, 1, 2], 1.0),
    ("matthews", [0, 1, 1, 0], [1, 1, 1, 1], 0.0),
    ("matthews", [1, 1, 1, 1], [1, 1, 1, 1], 0.0),
    ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
    ("pearson", [1.0, 2.0, 3.0], [5.0, 5.0, 5.0], 0.0),
    ("pearson", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
    ("spearman", [1.0, 2.0, 3.0], [1.0, 8.0, 27.0], 1.0),
    ("spearman", [1.0, 2.0, 3.0], [9.0, 4.0, 1.0], -1.0),
    ("spearman", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0),
]


@pytest.mark.parametrize(("name", "true", "predicted", "expected"), KNOWN)
def test_known_values_constants_and_single_classes(
    name: str, true: list[float], predicted: list[float], expected: float
) -> None:
    assert value(name, (np.array(true), np.array(predicted))) == pytest.approx(expected, abs=1e-12)


def test_matthews_of_many_rows_does_not_overflow() -> None:
    true = np.tile([0, 1, 2], 700_000)
    assert value("matthews", (true, np.where(np.arange(len(true)) % 2, true, 0))) == pytest.approx(
        plain_matthews(true, np.where(np.arange(len(true)) % 2, true, 0))
    )


@pytest.mark.parametrize(
    ("name", "figure", "unit"),
    [("accuracy", 0.4, 0.4), ("f1", 0.4, 0.4), ("matthews", -1.0, 0.0), ("pearson", 0.5, 0.75), ("spearman", 1.0, 1.0)],
)
def test_a_correlation_counts_on_the_scale_of_an_accuracy(name: str, figure: float, unit: float) -> None:
    assert on_unit_scale(name, figure) == unit


def test_the_overall_score_is_the_mean_on_that_scale() -> None:
    assert overall_score([("accuracy", 0.4), ("f1", 0.9), ("pearson", -0.5)]) == pytest.approx((0.4 + 0.9 + 0.25) / 3)


def test_an_unknown_metric_suggests_the_near_one() -> None:
    with pytest.raises(
        UnknownNameError, match=r"metric: 'pearsn'; expected one of accuracy, .*; did you mean 'pearson'\?"
    ):
        metric("pearsn")
