"""A contest: one set of adapters merged by every method in every space, each merge scored on all tasks, in one table.

A finished cell is one file, known by a fingerprint of everything that determines it, and never computed twice.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mergekit_bert.composing.composition import Merged, Model
from mergekit_bert.composing.file import write_model
from mergekit_bert.composing.ingredient import Ingredient, identity
from mergekit_bert.composing.merging import Given, merge
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.data.metrics import metric, on_unit_scale, predicted_column
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import MbertError, ModelFileError
from mergekit_bert.evaluation.records import Record
from mergekit_bert.files import fingerprint, read_tensors, remove, write_tensors
from mergekit_bert.hardware import memory_meter

_FORMAT = 1
RESAMPLES = 1000


@dataclass(frozen=True)
class Cell:
    """One merge and what it gave: ``outputs`` of every task's rows, seconds and bytes of the merge, or why not.

    ``learned`` is what a method that learns tells of it.
    """

    recipe: Recipe
    outputs: Mapping[str, Float[np.ndarray, "rows out"]]
    seconds: float
    size: int
    memory: int | None
    refused: str = ""
    learned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, its space where that is not full, its rank and that of remainders where one was asked for."""
        space = "" if self.recipe.space == "full" else f" in {self.recipe.space}"
        private = f" private {self.recipe.private}" if self.recipe.private else ""
        return f"{self.recipe.method}{space}{f' rank {self.recipe.rank}' if self.recipe.rank else ''}{private}"


@dataclass(frozen=True)
class Standing:
    """A cell's place: figures by task, overall, shares of the ensemble's, and how far it is behind the best merge."""

    cell: Cell
    values: Mapping[str, float]
    overall: float
    retention: Mapping[str, float]
    behind: tuple[float, float]
    """95 % interval of the best merge's overall score minus this one's, over paired resamples of the rows."""


def recipes_for(methods: Sequence[str], rows: bool, seed: int, rank: int | None = None) -> list[Recipe]:
    """A recipe for every method in every space (one where the space does not matter), and the ensemble first.

    Methods that need rows are left out where there are none, unless their statistics come with the adapters.
    """
    found = [Recipe(ENSEMBLE)]
    for name in methods:
        method = METHODS.get(name)
        if "rows" in method.needs and not rows:
            continue
        found += [
            Recipe(name, space, seed=seed, rank=rank) for space in (("full",) if method.linear else method.spaces)
        ]
    return found


def run_cell(
    recipe: Recipe,
    ingredients: Sequence[Ingredient],
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
    given: Given | None,
    folder: Path,
) -> Cell:
    """The cell of ``recipe``: read where it was finished before, else computed and kept."""
    reads = recipe.method != ENSEMBLE and bool(METHODS.get(recipe.method).needs)
    unlabelled = {name: given.rows(name).fingerprint() for name in tasks} if given is not None and reads else {}
    key = fingerprint(
        {
            "format": _FORMAT,
            "recipe": recipe.to_json(),
            "inputs": [identity(one) for one in ingredients],
            "base": encoder.fingerprint,
            "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
            "unlabelled": unlabelled,
            "torch": torch.__version__,
        }
    )
    path = folder / f"{key[:32]}.safetensors"
    kept = _read(path, recipe)
    if kept is not None:
        return kept
    start = time.monotonic()
    scratch = folder / f"{key[:32]}.model.safetensors"
    try:
        with memory_meter() as meter:
            if given is not None:
                given = dataclasses.replace(given, folder=folder / f"{key[:32]}.run")
            model = merge(ingredients, recipe, given)
            seconds = time.monotonic() - start
            write_model(scratch, model)
        size = scratch.stat().st_size
    except MbertError as error:
        return Cell(recipe, {}, 0.0, 0, None, str(error))
    finally:
        remove(scratch)
    found = _outputs(model, encoder, tasks)
    learned = dict(model.trace.get("learned", {})) if isinstance(model, Merged) else {}
    cell = Cell(recipe, found, seconds, size, meter.above, learned=learned)
    told = {"seconds": seconds, "size": size, "memory": meter.above, "learned": learned}
    write_tensors(path, {f"outputs.{name}": torch.from_numpy(values) for name, values in found.items()}, told)
    return cell


def _outputs(model: Model, encoder: Encoder, tasks: Mapping[str, tuple[Task, Rows]]) -> dict[str, np.ndarray]:
    predictor = Predictor(model, encoder)
    return {name: predictor.outputs(name, rows) for name, (_, rows) in tasks.items()}


def _read(path: Path, recipe: Recipe) -> Cell | None:
    if not path.exists():
        return None
    try:
        tensors, told = read_tensors(path)
        outputs = {name.removeprefix("outputs."): tensor.numpy() for name, tensor in tensors.items()}
        seconds, size, learned = float(told["seconds"]), int(told["size"]), told.get("learned", {})
        return Cell(recipe, outputs, seconds, size, told["memory"], learned=learned)
    except (ModelFileError, KeyError, TypeError, ValueError):
        return None


def full_figures(
    records: Sequence[Record], base: str, tasks: Mapping[str, tuple[Task, Rows]]
) -> dict[str, float] | None:
    """Full fine-tuning's figures on these rows, and ``overall``; None unless all are recorded."""
    found: dict[str, float] = {}
    for name, (task, rows) in tasks.items():
        wanted = (name, task.metric, rows.fingerprint())
        scores = [score for one in records if one.role == "full" and one.base == base for score in one.scores]
        match = next((one.value for one in scores if (one.task, one.metric, one.data) == wanted), None)
        if match is None:
            return None
        found[name] = match
    return found | {"overall": fmean(on_unit_scale(tasks[name][0].metric, value) for name, value in found.items())}


def standings(cells: Sequence[Cell], tasks: Mapping[str, tuple[Task, Rows]]) -> list[Standing]:
    """The finished cells, the best overall first (the ensemble is the first of ``cells`` and the reference)."""
    finished = [cell for cell in cells if not cell.refused]
    columns = {name: (task, rows.label_column(), metric(task.metric).value) for name, (task, rows) in tasks.items()}

    def values(cell: Cell, index: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        found = {}
        for name, (task, true, value) in columns.items():
            predicted = predicted_column(task.kind, cell.outputs[name])
            chosen = slice(None) if index is None else index[name]
            found[name] = value(true[chosen], predicted[chosen])
        return found

    def overall(found: Mapping[str, float]) -> float:
        return fmean(on_unit_scale(columns[name][0].metric, value) for name, value in found.items())

    figures = {id(cell): values(cell) for cell in finished}
    whole = figures[id(finished[0])]
    merges = [cell for cell in finished if cell.recipe.method != ENSEMBLE] or finished
    best = max(merges, key=lambda cell: overall(figures[id(cell)]))
    source = np.random.default_rng(0)
    draws = [
        {name: source.integers(0, len(true), len(true)) for name, (_, true, _) in columns.items()}
        for _ in range(RESAMPLES)
    ]
    top = np.array([overall(values(best, draw)) for draw in draws])
    placed = []
    for cell in finished:
        own = figures[id(cell)]
        apart = top - np.array([overall(values(cell, draw)) for draw in draws])
        low, high = np.percentile(apart, [2.5, 97.5])
        kept = {
            name: on_unit_scale(columns[name][0].metric, own[name])
            / on_unit_scale(columns[name][0].metric, whole[name])
            for name in own
            if on_unit_scale(columns[name][0].metric, whole[name]) > 0
        }
        kept["overall"] = overall(own) / overall(whole)
        placed.append(Standing(cell, own, overall(own), kept, (float(low), float(high))))
    return sorted(placed, key=lambda one: (-one.overall, one.cell.name))


@dataclass(frozen=True)
class Contest:
    """The standings, the best first, full fine-tuning's figures where they are recorded, and what was left out."""

    placed: Sequence[Standing]
    full: Mapping[str, float] | None
    refused: Mapping[str, str]


def to_json(contest: Contest) -> dict[str, Any]:
    """All figures, and why cells were refused."""
    return {
        "full": None if contest.full is None else dict(contest.full),
        "standings": [
            {
                "name": one.cell.name,
                "recipe": one.cell.recipe.to_json(),
                "values": dict(one.values),
                "overall": one.overall,
                "retention": dict(one.retention),
                "behind_best": list(one.behind),
                "seconds": round(one.cell.seconds, 3),
                "bytes": one.cell.size,
                "memory_bytes": one.cell.memory,
                "learned": dict(one.cell.learned),
                "needs": [] if one.cell.recipe.method == ENSEMBLE else list(METHODS.get(one.cell.recipe.method).needs),
            }
            for one in contest.placed
        ],
        "refused": dict(contest.refused),
    }
