"""Method comparison: adapters merged by every method in every space and scored on all tasks, as one table."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric, overall_score
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, OutputError
from mergekit_bert.evaluation.comparison import retention
from mergekit_bert.evaluation.merge_results import MergeResult, read_result
from mergekit_bert.evaluation.pictures import Mark, merges_picture
from mergekit_bert.evaluation.records import Record
from mergekit_bert.evaluation.result import Result
from mergekit_bert.files import fingerprint
from mergekit_bert.outputs import Output
from mergekit_bert.schema import Name, Plain, Schema, SchemaError, Sha256, validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ("table.json", "table.md", "picture.png")
"""Files that a comparison writes beside the cached results."""
RESAMPLES = 1000


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the table: a merge, its scores, its share of the ensemble's, and its distance to the best merge.

    ``values`` are the scores by task. ``retention`` is by task and ``overall``: the score divided by the ensemble's,
    None if there is no ensemble or its score is not positive.
    """

    result: MergeResult
    values: Mapping[str, float]
    overall: float
    retention: Mapping[str, float | None]
    behind: tuple[float, float]
    """95 % interval of the best merge's overall score minus this one's, by a paired bootstrap over rows."""

    @property
    def worst(self) -> tuple[float, str] | None:
        """The smallest retention of a task, and the task."""
        shares = [(share, task) for task, share in self.retention.items() if share is not None and task != "overall"]
        return min(shares, default=None)


def comparison_rows(results: Sequence[MergeResult], tasks: Mapping[str, tuple[Task, Rows]]) -> list[ComparisonRow]:
    """The merges that were not refused, sorted by overall score, best first; retention is relative to the ensemble.

    Raises CompositionError if every merge was refused.
    """
    finished = [result for result in results if not result.refused]
    if not finished:
        reasons = "; ".join(dict.fromkeys(f"{result.name}: {result.refused}" for result in results[:2]))
        raise CompositionError(
            "compare", f"every merge was refused ({reasons})", "one that succeeds", "give other inputs or methods"
        )
    columns = {name: (task, rows.label_column(task)) for name, (task, rows) in tasks.items()}

    def scores_on(result: MergeResult, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The scores by task on each sample of the rows."""
        scores = {}
        for name, (task, true) in columns.items():
            predicted = kind_of(task).predicted(task, result.outputs[name])
            scores[name] = metric(task.metric).of(true[samples[name]], predicted[samples[name]])
        return scores

    def overall(scores: Mapping[str, Any]) -> Any:
        return overall_score((columns[name][0].metric, score) for name, score in scores.items())

    all_rows = {name: np.arange(len(true)) for name, (_, true) in columns.items()}
    scores_of = {
        id(result): {name: float(score) for name, score in scores_on(result, all_rows).items()} for result in finished
    }
    ensemble = next((scores_of[id(result)] for result in finished if result.recipe.method == ENSEMBLE), None)
    merges = [result for result in finished if result.recipe.method != ENSEMBLE] or finished
    best = max(merges, key=lambda result: overall(scores_of[id(result)]))
    generator = np.random.default_rng(0)
    drawn = [[generator.integers(0, len(true), len(true)) for _, true in columns.values()] for _ in range(RESAMPLES)]
    samples = dict(zip(columns, map(np.stack, zip(*drawn, strict=True)), strict=True))
    best_overall = overall(scores_on(best, samples))
    rows = []
    for result in finished:
        scores = scores_of[id(result)]
        low, high = np.percentile(best_overall - overall(scores_on(result, samples)), [2.5, 97.5])
        shares = {name: retention(scores[name], ensemble[name] if ensemble else None) for name in scores}
        shares["overall"] = retention(overall(scores), overall(ensemble) if ensemble else None)
        rows.append(ComparisonRow(result, scores, overall(scores), shares, (float(low), float(high))))
    return sorted(rows, key=lambda row: (-row.overall, row.result.name))


@dataclass(frozen=True, repr=False)
class MethodComparison(Result):
    """The result of :func:`compare`: the scored merges, best first, and why others were refused.

    ``full`` has the scores of full fine-tuning by task and ``overall``, None unless all are recorded. ``refused`` maps
    the names of refused merges to the reasons. ``on`` is which rows were scored (``"dev"`` or ``"held-out"``), ``rows``
    their number by task. ``missing`` lists the commands that record missing scores of full fine-tuning on these rows;
    it is empty if they cannot be recorded.
    """

    merges: Sequence[ComparisonRow]
    full: Mapping[str, float] | None
    refused: Mapping[str, str]
    on: str
    rows: Mapping[str, int]
    missing: Sequence[str] = ()

    def __repr__(self) -> str:
        """One line: the number of merges, and the best."""
        best = f", best {self.merges[0].result.name} {self.merges[0].overall:.3f}" if self.merges else ""
        return f"MethodComparison({len(self.merges)} merges on {self.on}{best})"

    def records(self) -> list[dict[str, Any]]:
        """One record per merge, best first: scores by task, retention relative to the ensemble, and cost."""
        return [
            {
                "merge": row.result.name,
                **_scores(row),
                **{f"retention_{name}": share for name, share in row.retention.items()},
                "behind_low": row.behind[0],
                "behind_high": row.behind[1],
                "seconds": row.result.seconds,
                "bytes": row.result.size,
            }
            for row in self.merges
        ]

    def plot(self) -> "Figure":
        """Retention of every merge by task, and its overall score against file size and seconds."""
        return merges_picture(
            [
                Mark(row.result.name, row.retention, row.overall, row.result.size, row.result.seconds)
                for row in self.merges
            ]
        )


def comparison_fingerprint(
    merge_inputs: Sequence[MergeInput], encoder: Encoder, tasks: Mapping[str, tuple[Task, Rows]]
) -> str:
    """SHA-256 (hex) of what the merges in one table must have in common: inputs, base and rows to score on."""
    rows = {name: rows.fingerprint() for name, (_, rows) in tasks.items()}
    return fingerprint([[merge_input.identify() for merge_input in merge_inputs], encoder.fingerprint, rows])


def refuse_other_results(folder: Path, comparison: str, force: bool) -> None:
    """Raise OutputError if ``folder`` contains results of another comparison or other files, unless ``force``."""
    table = folder / RESULTS[0]
    try:
        earlier = _earlier(table)
    except (DocumentError, SchemaError) as error:
        if not force:
            remedy = "choose another `out` or give `force`"
            raise OutputError(str(table), f"broken ({error})", "a table as mbert writes it", remedy) from error
        earlier = None
    recorded = earlier.comparison if earlier is not None else None
    for path in (folder / name for name in RESULTS):
        Output(path, force=True).refuse()
        if recorded != comparison and path.exists() and not force:
            raise OutputError(
                str(path),
                "results for other inputs or rows",
                "a separate folder for each comparison",
                "choose another `out` or give `force`",
            )


def with_earlier_results(
    results: Sequence[MergeResult], folder: Path, comparison: str, tasks: Mapping[str, tuple[Task, Rows]]
) -> list[MergeResult]:
    """``results``, and the other merges in the table in ``folder`` if it has the same comparison, program and machine.

    They are read from the cache; a result whose file is missing is left out, and nothing is computed.
    """
    table, names = None, {result.name for result in results}
    with contextlib.suppress(DocumentError, SchemaError):  # the user has allowed overwriting it
        table = _earlier(folder / RESULTS[0])
    if table is None or table.comparison != comparison or table.made_by != made_by():
        return list(results)
    listed = [MergeResult(row.recipe, {}, 0.0, 0, None, steps=row.calibrated, key=row.cell) for row in table.standings]
    cached = [read_result(folder, result, tasks) for result in listed if result.name not in names]
    return [*results, *(result for result in cached if result is not None)]


class _Part(Schema):
    """The part of table.json that is read back; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class _Row(_Part):
    recipe: Recipe
    calibrated: tuple[Literal["scales", "heads"], ...]
    cell: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]


class _Table(_Part):
    comparison: Sha256
    made_by: dict[Name, Plain]
    standings: list[_Row]


def _earlier(path: Path) -> _Table | None:
    """The contents of a table.json; None if it does not exist. Raises DocumentError or SchemaError if it is broken."""
    try:
        return validate(_Table, read_mapping(path))
    except OSError:
        return None


def full_finetuning_scores(
    records: Sequence[Record], base: str, tasks: Mapping[str, tuple[Task, Rows]]
) -> dict[str, float]:
    """The recorded scores of full fine-tuning on these rows, by task, and ``overall`` if every task has one."""
    recorded: dict[str, float] = {}
    for name, (task, rows) in tasks.items():
        wanted = (name, task.metric, rows.fingerprint())
        scores = [
            score for record in records if record.role == "full" and record.base == base for score in record.scores
        ]
        match = next((score.value for score in scores if (score.task, score.metric, score.data) == wanted), None)
        if match is not None:
            recorded[name] = match
    if len(recorded) == len(tasks):
        recorded["overall"] = overall_score((task.metric, recorded[name]) for name, (task, _) in tasks.items())
    return recorded


def to_json(comparison: MethodComparison) -> dict[str, Any]:
    """All scores and refusals. ``retention`` is relative to the ensemble, ``retention_full`` to fine-tuning.

    The rows are under ``standings``, and ``cell`` is the cache key of the result.
    """

    def of_full(row: ComparisonRow) -> dict[str, float | None] | None:
        if comparison.full is None:
            return None
        return {name: retention(score, comparison.full[name]) for name, score in _scores(row).items()}

    return {
        "on": comparison.on,
        "rows": dict(comparison.rows),
        "full": None if comparison.full is None else dict(comparison.full),
        "missing": list(comparison.missing),
        "standings": [
            {
                "name": row.result.name,
                "cell": row.result.key,
                "recipe": row.result.recipe.to_json(),
                "calibrated": list(row.result.steps),
                "values": dict(row.values),
                "overall": row.overall,
                "retention": dict(row.retention),
                "retention_full": of_full(row),
                "behind_best": list(row.behind),
                "seconds": round(row.result.seconds, 3),
                "bytes": row.result.size,
                "memory_bytes": row.result.memory,
                "learned": dict(row.result.learned),
                "needs": list(row.result.needs),
            }
            for row in comparison.merges
        ],
        "refused": dict(comparison.refused),
    }


def _scores(row: ComparisonRow) -> dict[str, float]:
    return {**row.values, "overall": row.overall}
