"""Scores: their intervals against a brute-force bootstrap, and the predictions they can be computed from again."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from mergekit_bert.data.metric import METRICS
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.evaluation.scores import Score, TaskResult, scores_of, write_predictions
from tests.corpus import read_tsv
from tests.tiny import tiny_rows

EVERY = {
    "classify": Task(
        name="c", kind="classify", text=("a",), metrics=("accuracy", "f1", "matthews"), labels=("no", "yes", "may be")
    ),
    "regress": Task(name="r", kind="regress", text=("a",), metrics=("pearson", "spearman"), range=(-2.0, 3.0)),
}


def outputs_near(rows: Rows, task: Task, noise: float, seed: int = 0) -> np.ndarray:
    """Outputs that agree with the labels up to some noise."""
    source = np.random.default_rng(seed)
    true = rows.label_column(task)
    if task.range is not None:
        return (true + noise * source.normal(size=len(rows)))[:, None].astype(np.float32)
    return (np.eye(task.outputs)[true.astype(int)] + noise * source.normal(size=(len(rows), task.outputs))).astype(
        np.float32
    )


def brute_force(task: Task, name: str, rows: Rows, outputs: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile over 1000 samples drawn with replacement, row by row."""
    source = random.Random(7)
    true = rows.label_column(task)
    predicted = outputs.argmax(1) if task.range is None else outputs[:, 0].astype(np.float64)
    values = []
    for _ in range(1000):
        chosen = [source.randrange(len(rows)) for _ in range(len(rows))]
        values.append(METRICS.get(name).value(true[chosen], predicted[chosen]))
    values.sort()
    return values[int(0.025 * 1000)], values[int(0.975 * 1000)]


@pytest.mark.parametrize(("kind", "noise"), [("classify", 0.6), ("regress", 0.8)])
def test_an_interval_is_that_of_a_bootstrap_over_rows(kind: str, noise: float) -> None:
    task = EVERY[kind]
    rows = tiny_rows(task, 300)
    outputs = outputs_near(rows, task, noise)
    scores = scores_of(task, rows, outputs)
    assert tuple(score.metric for score in scores) == task.metrics
    for score in scores:
        low, high = brute_force(task, score.metric, rows, outputs)
        assert (score.ci_low, score.ci_high) == pytest.approx((low, high), abs=0.1 * (high - low))
        assert score.ci_high - score.ci_low == pytest.approx(high - low, rel=0.12)  # that of 90 % is 16 % narrower
        assert low < score.value < high
        assert (score.task, score.n, score.data) == (task.name, 300, rows.fingerprint())
    assert scores_of(task, rows, outputs) == scores


def test_an_interval_narrows_with_the_root_of_the_rows() -> None:
    task = EVERY["classify"]
    widths = []
    for count in (100, 1600):
        rows = tiny_rows(task, count)
        score = scores_of(task, rows, outputs_near(rows, task, 0.6))[0]
        widths.append(score.ci_high - score.ci_low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("kind", EVERY)
def test_perfect_outputs_have_no_spread(kind: str) -> None:
    task = EVERY[kind]
    rows = tiny_rows(task, 40)
    for score in scores_of(task, rows, outputs_near(rows, task, 0.0)):
        assert (score.value, score.ci_low, score.ci_high) == pytest.approx((1, 1, 1), abs=1e-6)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_rows_are_enough_for_a_figure(kind: str, count: int) -> None:
    task = EVERY[kind]
    rows = tiny_rows(task, count)
    for score in scores_of(task, rows, outputs_near(rows, task, 0.5)):
        assert np.isfinite([score.value, score.ci_low, score.ci_high]).all()
        assert score.ci_low <= score.value <= score.ci_high
        assert score.n == count


@pytest.mark.parametrize("kind", EVERY)
def test_constant_outputs_give_finite_figures(kind: str) -> None:
    task = EVERY[kind]
    rows = tiny_rows(task, 30)
    for score in scores_of(task, rows, np.ones((30, task.outputs), dtype=np.float32)):
        assert np.isfinite([score.value, score.ci_low, score.ci_high]).all()


def test_a_score_computes_without_touching_numpys_global_state() -> None:
    task = EVERY["regress"]
    rows = tiny_rows(task, 20)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    scores_of(task, rows, outputs_near(rows, task, 0.5))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@pytest.mark.parametrize("name", ["sst", "sts"])
def test_the_figures_follow_from_the_written_predictions(tmp_path: Path, name: str) -> None:
    task = get_task(name)
    rows = tiny_rows(task, 50)
    outputs = outputs_near(rows, task, 1.0)
    scores = scores_of(task, rows, outputs)
    write_predictions(tmp_path / "p.tsv", TaskResult(task, rows, outputs, scores))
    written = read_tsv(tmp_path / "p.tsv")
    assert [int(row["row"]) for row in written] == list(range(1, 51))
    if name == "sst":
        logits = np.array([[float(row[f"output_{label}"]) for label in task.labels] for row in written])
        np.testing.assert_array_equal(logits.astype(np.float32), outputs)
        assert [row["prediction"] for row in written] == [task.labels[index] for index in logits.argmax(1)]
        right = sum(row["label"] == row["prediction"] for row in written)
        assert scores[0].value == right / 50
    else:
        values = np.array([float(row["output"]) for row in written])
        np.testing.assert_array_equal(values.astype(np.float32), outputs[:, 0])
        labels = np.array([float(row["label"]) for row in written])
        assert scores[0].value == pytest.approx(np.corrcoef(labels, values)[0, 1], abs=1e-9)
        for row, value in zip(written, values, strict=True):
            assert float(row["prediction"]) == pytest.approx(min(max(value, 0.0), 5.0), abs=1e-4)


def test_labels_that_need_quotes_come_back(tmp_path: Path) -> None:
    task = Task(name="t", kind="classify", text=("a",), metrics=("accuracy",), labels=("a\tb", 'say "x"'))
    rows = Rows((("x",), ("y",)), (0.0, 1.0), "here")
    outputs = np.array([[1, 0], [0, 1]], dtype=np.float32)
    write_predictions(tmp_path / "p.tsv", TaskResult(task, rows, outputs, ()))
    assert [row["label"] for row in read_tsv(tmp_path / "p.tsv")] == ["a\tb", 'say "x"']


def test_a_score_is_a_plain_record() -> None:
    score = Score("a", "accuracy", 0.5, 0.4, 0.6, 10, "f")
    assert dataclasses.replace(score, value=0.5) == score
