"""A contest: the merges of one set of adapters by every method in every space, scored on all tasks, in one table."""

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
from mergekit_bert.evaluation.cells import Cell, read_cell
from mergekit_bert.evaluation.comparison import retention
from mergekit_bert.evaluation.pictures import Mark, merges_picture
from mergekit_bert.evaluation.records import Record
from mergekit_bert.evaluation.result import Result
from mergekit_bert.files import fingerprint
from mergekit_bert.outputs import Output
from mergekit_bert.schema import Name, Plain, Schema, SchemaError, Sha256, validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = ("table.json", "table.md", "picture.png")
"""What a contest writes beside its cells."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Standing:
    """A cell's place: figures by task, overall, what it keeps of the ensemble's, how far it is behind the best merge.

    ``retention`` is by task and ``overall``, None where there is no ensemble or its figure is not positive.
    """

    cell: Cell
    values: Mapping[str, float]
    overall: float
    retention: Mapping[str, float | None]
    behind: tuple[float, float]
    """95 % interval of the best merge's overall score minus this one's, over paired resamples of the rows."""

    @property
    def worst(self) -> tuple[float, str] | None:
        """The least share that a task keeps, and the task."""
        known = [(kept, task) for task, kept in self.retention.items() if kept is not None and task != "overall"]
        return min(known, default=None)


def standings(cells: Sequence[Cell], tasks: Mapping[str, tuple[Task, Rows]]) -> list[Standing]:
    """The finished cells, the best overall first; the reference is the ensemble, where it was not refused.

    Raises CompositionError where every cell was refused.
    """
    finished = [cell for cell in cells if not cell.refused]
    if not finished:
        reasons = "; ".join(dict.fromkeys(f"{cell.name}: {cell.refused}" for cell in cells[:2]))
        raise CompositionError(
            "compare", f"every merge was refused ({reasons})", "one that works", "give other inputs or methods"
        )
    columns = {name: (task, rows.label_column(task)) for name, (task, rows) in tasks.items()}

    def values(cell: Cell, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The figures on each draw of the rows."""
        found = {}
        for name, (task, true) in columns.items():
            predicted = kind_of(task).predicted(task, cell.outputs[name])
            found[name] = metric(task.metric).of(true[draws[name]], predicted[draws[name]])
        return found

    def overall(found: Mapping[str, Any]) -> Any:
        return overall_score((columns[name][0].metric, value) for name, value in found.items())

    every = {name: np.arange(len(true)) for name, (_, true) in columns.items()}
    figures = {id(cell): {name: float(one) for name, one in values(cell, every).items()} for cell in finished}
    whole = next((figures[id(cell)] for cell in finished if cell.recipe.method == ENSEMBLE), None)
    merges = [cell for cell in finished if cell.recipe.method != ENSEMBLE] or finished
    best = max(merges, key=lambda cell: overall(figures[id(cell)]))
    source = np.random.default_rng(0)
    drawn = [[source.integers(0, len(true), len(true)) for _, true in columns.values()] for _ in range(RESAMPLES)]
    draws = dict(zip(columns, map(np.stack, zip(*drawn, strict=True)), strict=True))
    top = overall(values(best, draws))
    placed = []
    for cell in finished:
        own = figures[id(cell)]
        low, high = np.percentile(top - overall(values(cell, draws)), [2.5, 97.5])
        kept = {name: retention(own[name], whole[name] if whole else None) for name in own}
        kept["overall"] = retention(overall(own), overall(whole) if whole else None)
        placed.append(Standing(cell, own, overall(own), kept, (float(low), float(high))))
    return sorted(placed, key=lambda one: (-one.overall, one.cell.name))


@dataclass(frozen=True, repr=False)
class Contest(Result):
    """The standings, the best first, full fine-tuning's figures where they are recorded, and what was left out.

    ``on`` says which rows were scored (``DEV`` or ``HELD_OUT`` of :mod:`~mergekit_bert.evaluation.held_out`), ``rows``
    how many of each task. ``missing`` are commands that record full fine-tuning's figures on these rows: none where
    they are all recorded, or cannot be.
    """

    placed: Sequence[Standing]
    full: Mapping[str, float] | None
    refused: Mapping[str, str]
    on: str
    rows: Mapping[str, int]
    missing: Sequence[str] = ()

    def __repr__(self) -> str:
        """One line: how many merges, and the best."""
        best = f", best {self.placed[0].cell.name} {self.placed[0].overall:.3f}" if self.placed else ""
        return f"Contest({len(self.placed)} merges on {self.on}{best})"

    def records(self) -> list[dict[str, Any]]:
        """One line for each merge, the best first: figures by task, what it keeps of the ensemble's, what it costs."""
        return [
            {
                "merge": one.cell.name,
                **_figures(one),
                **{f"retention_{name}": kept for name, kept in one.retention.items()},
                "behind_low": one.behind[0],
                "behind_high": one.behind[1],
                "seconds": one.cell.seconds,
                "bytes": one.cell.size,
            }
            for one in self.placed
        ]

    def plot(self) -> "Figure":
        """What every merge keeps of the ensemble by task, and its score against bytes and seconds."""
        return merges_picture(
            [Mark(one.cell.name, one.retention, one.overall, one.cell.size, one.cell.seconds) for one in self.placed]
        )


def comparison_of(merge_inputs: Sequence[MergeInput], encoder: Encoder, tasks: Mapping[str, tuple[Task, Rows]]) -> str:
    """What two tables must share to be of one comparison: inputs, base and rows to score on, as one SHA-256 (hex)."""
    rows = {name: rows.fingerprint() for name, (_, rows) in tasks.items()}
    return fingerprint([[one.identify() for one in merge_inputs], encoder.fingerprint, rows])


def refuse_other(folder: Path, comparison: str, force: bool) -> None:
    """Raise OutputError where ``folder`` has results of another comparison, or of anything else, unless ``force``."""
    table = folder / RESULTS[0]
    try:
        earlier = _earlier(table)
    except (DocumentError, SchemaError) as error:
        if not force:
            found, remedy = f"broken ({error})", "choose another `out` or give `force`"
            raise OutputError(str(table), found, "a table as mbert writes it", remedy) from error
        earlier = None
    known = earlier.comparison if earlier is not None else None
    for path in (folder / name for name in RESULTS):
        Output(path, force=True).refuse()
        if known != comparison and path.exists() and not force:
            raise OutputError(
                str(path),
                "it is of other inputs or rows",
                "a folder of its own",
                "choose another `out` or give `force`",
            )


def with_earlier(
    cells: Sequence[Cell], folder: Path, comparison: str, tasks: Mapping[str, tuple[Task, Rows]]
) -> list[Cell]:
    """``cells``, and the others of the table in ``folder``, where the same ``comparison``, program and machine made it.

    They are read from their files; one whose file is gone is left out, and nothing is computed.
    """
    table, names = None, {cell.name for cell in cells}
    with contextlib.suppress(DocumentError, SchemaError):  # it is written over, as the user said
        table = _earlier(folder / RESULTS[0])
    if table is None or table.comparison != comparison or table.made_by != made_by():
        return list(cells)
    earlier = [Cell(one.recipe, {}, 0.0, 0, None, steps=one.calibrated, key=one.cell) for one in table.standings]
    kept = [read_cell(folder, one, tasks) for one in earlier if one.name not in names]
    return [*cells, *(one for one in kept if one is not None)]


class _Part(Schema):
    """A part of table.json, which holds more for people to read."""

    model_config = ConfigDict(extra="ignore")


class _Line(_Part):
    recipe: Recipe
    calibrated: tuple[Literal["scales", "heads"], ...]
    cell: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]


class _Table(_Part):
    comparison: Sha256
    made_by: dict[Name, Plain]
    standings: list[_Line]


def _earlier(path: Path) -> _Table | None:
    """What a table.json says; None where there is none. Raises DocumentError or SchemaError for anything else."""
    try:
        return validate(_Table, read_mapping(path))
    except OSError:
        return None


def full_figures(records: Sequence[Record], base: str, tasks: Mapping[str, tuple[Task, Rows]]) -> dict[str, float]:
    """Full fine-tuning's figures on these rows, by task where they are recorded, and ``overall`` if they all are."""
    found: dict[str, float] = {}
    for name, (task, rows) in tasks.items():
        wanted = (name, task.metric, rows.fingerprint())
        scores = [score for one in records if one.role == "full" and one.base == base for score in one.scores]
        match = next((one.value for one in scores if (one.task, one.metric, one.data) == wanted), None)
        if match is not None:
            found[name] = match
    if len(found) == len(tasks):
        found["overall"] = overall_score((task.metric, found[name]) for name, (task, _) in tasks.items())
    return found


def to_json(contest: Contest) -> dict[str, Any]:
    """All figures, and why cells were refused. ``retention`` is of the ensemble, ``retention_full`` of fine-tuning."""

    def of_full(one: Standing) -> dict[str, float | None] | None:
        if contest.full is None:
            return None
        return {name: retention(value, contest.full[name]) for name, value in _figures(one).items()}

    return {
        "on": contest.on,
        "rows": dict(contest.rows),
        "full": None if contest.full is None else dict(contest.full),
        "missing": list(contest.missing),
        "standings": [
            {
                "name": one.cell.name,
                "cell": one.cell.key,
                "recipe": one.cell.recipe.to_json(),
                "calibrated": list(one.cell.steps),
                "values": dict(one.values),
                "overall": one.overall,
                "retention": dict(one.retention),
                "retention_full": of_full(one),
                "behind_best": list(one.behind),
                "seconds": round(one.cell.seconds, 3),
                "bytes": one.cell.size,
                "memory_bytes": one.cell.memory,
                "learned": dict(one.cell.learned),
                "needs": list(one.cell.needs),
            }
            for one in contest.placed
        ],
        "refused": dict(contest.refused),
    }


def _figures(one: Standing) -> dict[str, float]:
    return {**one.values, "overall": one.overall}
