"""Evaluating a model on every task it answers: scores, recorded results, predictions, and the comparison."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bert.composing.composition import Model, Seen, find_task
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import CompositionError, MbertWarning, OutputError
from mergekit_bert.evaluation.comparison import Comparison, compare
from mergekit_bert.evaluation.pictures import heatmap
from mergekit_bert.evaluation.records import find_records, write_record
from mergekit_bert.evaluation.result import Result
from mergekit_bert.evaluation.scores import Score, TaskResult, score_task, write_predictions
from mergekit_bert.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What an evaluation found: each task's result, and the comparison with the references."""

    results: tuple[TaskResult, ...]
    comparison: Comparison

    @property
    def scores(self) -> tuple[Score, ...]:
        """All scores, task by task."""
        return tuple(score for result in self.results for score in result.scores)

    def records(self) -> list[dict[str, Any]]:
        """One line for each task and metric: the figure, its interval, the references', and what it is of these."""
        scores: list[dict[str, Any]] = self.comparison.to_json()["scores"]
        return scores

    def plot(self) -> "Figure":
        """The main figures of the model and its references, coloured by the share of full fine-tuning."""
        return heatmap(self.comparison.grid(), "full", self.comparison.model)

    def __repr__(self) -> str:
        """One line: every score."""
        return f"Evaluation({', '.join(f'{one.task} {one.metric} {one.value:.3f} on {one.n}' for one in self.scores)})"


def reference_folders(path: Path) -> list[Path]:
    """Where references are looked for: beside the model, and in ``adapters/`` and ``models/`` there and here."""
    return [path.parent, *(root / name for root in (path.parent, Path()) for name in ("adapters", "models"))]


def evaluate_model(
    predictor: Predictor,
    rows_of: Callable[[Task], Rows],
    path: Path | None = None,
    tasks: Sequence[str] = (),
    predictions: Path | None = None,
    show: bool = False,
    data: Data = None,
    spelled: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score ``predictor`` on the rows that ``rows_of`` gives for each task (all of them, or those named).

    With ``path``, the model's file, the figures are recorded beside it and references are looked for around it. With
    ``predictions``, a folder, the predictions behind the figures are written there, one TSV a task. ``data`` and
    ``spelled`` are how the caller named the rows, for the commands that the comparison suggests.
    """
    model = predictor.model
    chosen = [find_task(model, name) for name in tasks] or list(model.tasks)
    rows = {task.name: rows_of(task) for task in chosen}
    refuse_seen(predictor.where, model.seen(), rows)
    results = []
    for task in chosen:
        with progress_bar(f"eval {task.name}", len(rows[task.name]), show) as bar:
            result = score_task(predictor, task, rows[task.name], bar)
        if predictions is not None:
            write_predictions(predictions / f"{task.name}.tsv", result, predictor.where)
        results.append(result)
    scores = [score for result in results for score in result.scores]
    if path is not None:
        _record(path, model, scores)
    records = find_records(reference_folders(path)) if path is not None else []
    return Evaluation(tuple(results), compare(model, scores, records, data, spelled))


def refuse_seen(where: str, seen: Seen, rows: Mapping[str, Rows]) -> None:
    """Raise CompositionError for rows among those ``seen``: whose labels a model was searched or calibrated on."""
    for step, task, fingerprint, hashes in seen:
        if task not in rows:
            continue
        # Old files know the fingerprint of all rows, and nothing of each.
        same = 0 if hashes or rows[task].fingerprint() != fingerprint else len(rows[task])
        if count := same or sum(one in hashes for one in rows[task].hashes()):
            raise CompositionError(
                f"{where}, task {task!r}",
                f"{count} of {len(rows[task])} rows are among those whose labels the model has seen ({step})",
                "rows apart from those",
                "give other rows",
            )


def _record(path: Path, model: Model, scores: Sequence[Score]) -> None:
    """Record the figures beside the model; where nothing can be written they are no less true."""
    try:
        write_record(path, model, scores)
    except OutputError as error:
        warnings.warn(f"the figures are not recorded: {error}", MbertWarning, stacklevel=3)
