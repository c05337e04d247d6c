"""Scores: model × task → metric value, 95 % interval, number of rows, and the predictions behind them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.readers import tsv_text
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.files import write_atomic
from mergekit_bert.models.prediction import Predictor, predictions
from mergekit_bert.schema import Count, Name
from mergekit_bert.strict import STRICT

Figure = Annotated[float, Field(ge=-100, le=100)]
"""Of a metric: all of them lie within ±1, give or take rounding."""


@dataclass(frozen=True)
class Score:
    """One figure: ``value`` of ``metric`` on ``n`` rows (known by ``data``), 95 % within ``ci_low`` … ``ci_high``."""

    __pydantic_config__: ClassVar = STRICT

    task: Name
    metric: Name
    value: Figure
    ci_low: Figure
    ci_high: Figure
    n: Count
    data: Name


@dataclass(frozen=True)
class TaskResult:
    """A task's scores, the main metric first, and the outputs they were computed from."""

    task: Task
    rows: Rows
    outputs: Float[np.ndarray, "rows out"]
    scores: tuple[Score, ...]


def score_task(
    predictor: Predictor, task: Task, rows: Rows, tick: Callable[[int], None] = lambda rows: None
) -> TaskResult:
    """Score one task of a model on labelled ``rows``."""
    outputs = predictor.outputs(task.name, rows, tick)
    return TaskResult(task, rows, outputs, scores_of(task, rows, outputs))


def scores_of(task: Task, rows: Rows, outputs: Float[np.ndarray, "rows out"]) -> tuple[Score, ...]:
    """Every metric of the task, with its interval."""
    true, predicted = rows.label_column(task), kind_of(task).predicted(task, outputs)
    found = []
    for one in map(metric, task.metrics):
        low, high = one.interval(true, predicted)
        found.append(Score(task.name, one.name, one.value(true, predicted), low, high, len(rows), rows.fingerprint()))
    return tuple(found)


def write_predictions(path: Path, result: TaskResult, where: str = "model") -> None:
    """Write a TSV: row number, true label, prediction, and the head's outputs, from which every figure follows.

    Raises ModelFileError for outputs that are not finite; ``where`` is what the message calls the model.
    """
    task, kind, labels = result.task, kind_of(result.task), result.rows.labels
    assert labels is not None
    names = [f"output_{name}" if name else "output" for name in kind.output_names(task)]
    lines: list[list[object]] = [["row", "label", "prediction", *names]]
    for number, answer in enumerate(predictions(task, result.outputs, where)):
        outputs = [f"{value:.9g}" for value in answer.outputs]
        lines.append([number + 1, kind.cell(task, labels[number]), answer.label, *outputs])
    write_atomic(path, tsv_text(lines).encode())
