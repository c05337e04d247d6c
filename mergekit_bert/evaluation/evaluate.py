"""Evaluate a model on every task it answers: scores, recorded results, predictions, and comparison with references."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import CompositionError, MbertWarning, OutputError
from mergekit_bert.evaluation.comparison import Comparison, compare
from mergekit_bert.evaluation.pictures import heatmap
from mergekit_bert.evaluation.records import find_records, write_record
from mergekit_bert.evaluation.result import Result
from mergekit_bert.evaluation.scores import Score, TaskResult, score_task, write_predictions
from mergekit_bert.models.composition import Model, Seen, find_task
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The result of :func:`evaluate`: each task's scores and predictions, and the comparison with the references."""

    results: tuple[TaskResult, ...]
    comparison: Comparison

    @property
    def scores(self) -> tuple[Score, ...]:
        """All scores, task by task."""
        return tuple(score for result in self.results for score in result.scores)

    def records(self) -> list[dict[str, Any]]:
        """One record per task and metric: the score, its interval, the references' scores, and the share of each."""
        scores: list[dict[str, Any]] = self.comparison.to_json()["scores"]
        return scores

    def plot(self) -> "Figure":
        """The main scores of the model and its references, coloured by their share of full fine-tuning."""
        return heatmap(self.comparison.grid(), "full", self.comparison.model)

    def __repr__(self) -> str:
        """One line: every score."""
        return f"Evaluation({', '.join(f'{s.task} {s.metric} {s.value:.3f} on {s.n}' for s in self.scores)})"


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
    """Score ``predictor`` on the rows that ``rows_of`` returns for each task (all, or those in ``tasks``).

    With ``path``, the model's file, the scores are recorded beside it, and references are looked for there. With
    ``predictions``, a folder, the predictions are written there, one TSV per task. ``data`` and ``spelled`` are how the
    caller named the rows, for the commands that the comparison suggests.
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
    """Raise CompositionError if a row is in ``seen``: its label was used to search or calibrate the model."""
    for step, task, fingerprint, hashes in seen:
        if task not in rows:
            continue
        # Old files contain a fingerprint of all rows, but no hash of each.
        identical = 0 if hashes or rows[task].fingerprint() != fingerprint else len(rows[task])
        if count := identical or sum(row in hashes for row in rows[task].hashes()):
            raise CompositionError(
                f"{where}, task {task!r}",
                f"{count} of {len(rows[task])} rows are among those whose labels the model has seen ({step})",
                "other rows",
                "give other rows",
            )


def _record(path: Path, model: Model, scores: Sequence[Score]) -> None:
    """Record the scores beside the model; if that fails, they are still valid, so it is only a warning."""
    try:
        write_record(path, model, scores)
    except OutputError as error:
        warnings.warn(f"the scores are not recorded: {error}", MbertWarning, stacklevel=3)
