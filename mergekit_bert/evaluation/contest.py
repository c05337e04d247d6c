"""A contest: one set of adapters merged by every method in every space, each merge scored on all tasks, in one table.

A finished cell is one file, known by a fingerprint of everything that determines it, and never computed twice.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mergekit_bert.composing.calibration import calibrate_heads, calibrate_scales
from mergekit_bert.composing.composition import Merged, Model
from mergekit_bert.composing.file import write_model
from mergekit_bert.composing.ingredient import Ingredient, identity
from mergekit_bert.composing.merging import Given, merge, reads_rows
from mergekit_bert.composing.method import METHODS, chosen_weights, make_options
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe
from mergekit_bert.data.metrics import metric, on_unit_scale, predicted_column
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, MbertError, ModelFileError, OutputError
from mergekit_bert.evaluation.comparison import retention
from mergekit_bert.evaluation.evaluate import refuse_seen
from mergekit_bert.evaluation.records import Record
from mergekit_bert.files import fingerprint, read_tensors, remove, write_tensors
from mergekit_bert.hardware import memory_meter

DEV, HELD_OUT = "dev", "held-out"
"""The rows that a contest is scored on: the dev split, or what the adapters' training held out of train."""
RESULTS = ("table.json", "table.md", "picture.png")
"""What a contest writes beside its cells."""
RESAMPLES = 1000
_FORMAT = 2
_DECIDING = ("hardware.py", "data", "encoder", "adapters", "composing")
"""Where the source lies that decides what a merge is and what it answers."""

Calibration = Mapping[str, Mapping[str, Rows]]
"""Rows of every task by step (``scales``, ``heads``), in the order in which the steps are taken; empty: none is."""


@dataclass(frozen=True)
class Cell:
    """One merge and what it gave: ``outputs`` of every task's rows, seconds and bytes of the merge, or why not.

    ``learned`` is what a method that learns tells of it; ``steps`` are those of a calibration after the merge.
    """

    recipe: Recipe
    outputs: Mapping[str, Float[np.ndarray, "rows out"]]
    seconds: float
    size: int
    memory: int | None
    refused: str = ""
    learned: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method, its space where that is not full, its rank, that of remainders, and the steps afterwards."""
        space = "" if self.recipe.space == "full" else f" in {self.recipe.space}"
        private = f" private {self.recipe.private}" if self.recipe.private else ""
        merged = f"{self.recipe.method}{space}{f' rank {self.recipe.rank}' if self.recipe.rank else ''}{private}"
        return " + ".join([merged, *self.steps])

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method needs beyond the Deltas, and what calibration does."""
        own = () if self.recipe.method == ENSEMBLE else METHODS.get(self.recipe.method).needs
        more = {"scales": "rows", "heads": "labels"}
        return tuple(dict.fromkeys([*own, *(more[step] for step in self.steps)]))


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


def recipes_for(
    methods: Sequence[str], seed: int = 0, rank: int | None = None, private: int | None = None
) -> list[Recipe]:
    """The ensemble, then a recipe for every method in every space (one where the space does not matter)."""
    found = [Recipe(ENSEMBLE)]
    for name in methods:
        method = METHODS.get(name)
        spaces = ("full",) if method.linear else method.spaces
        found += [Recipe(name, space, seed=seed, rank=rank, private=private) for space in spaces]
    return found


def training_split(task: str, training: Mapping[str, Any], train: Rows) -> tuple[Rows, Rows]:
    """(the rest, the rows held out) of ``train``, by the training that the record of an input tells of.

    Raises CompositionError where it does not tell, or tells of other rows: which were trained on is then unknown.
    """
    if not {"hold_out", "hold_out_limit", "seed", "data"} <= set(training):
        raise CompositionError(
            f"--on {HELD_OUT}, task {task!r}",
            "an input that does not tell which rows its training held out",
            "adapters trained by mbert",
            f"leave it out, or score on {DEV}",
        )
    if training["data"] != train.fingerprint():
        raise CompositionError(
            f"--on {HELD_OUT}, task {task!r}",
            f"rows in {train.where} that are not those it was trained on",
            "the train split of its training",
            f"give that as --data, or score on {DEV}",
        )
    return hold_out(train, training["hold_out"], training["hold_out_limit"], training["seed"])


def run_cells(
    recipe: Recipe,
    ingredients: Sequence[Ingredient],
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
    given: Given | None,
    folder: Path,
    calibration: Calibration | None = None,
) -> list[Cell]:
    """The cell of ``recipe`` scored on ``tasks``, and with ``calibration`` that of the same merge calibrated.

    Each is read where it was finished before, else computed and kept in ``folder``; what is merged is merged once. A
    cell is known by the inputs, the base, the rows scored on and those learned or calibrated on, by the recipe with
    every option and weight that it does not name, by the versions of torch and transformers, and by the source of
    mbert's merging, adapters, encoder and data. So a changed default or method is a new cell, a changed table is not.
    """
    variants: list[Calibration] = [{}]
    if calibration and recipe.method != ENSEMBLE:
        variants.append(calibration)
    reads = given is not None and recipe.method in METHODS.names() and reads_rows(recipe, ingredients)
    unlabelled = {name: given.rows(name).fingerprint() for name in tasks} if given is not None and reads else {}
    try:
        settled = _settled(recipe, ingredients).to_json()
    except MbertError as error:
        return [Cell(recipe, {}, 0.0, 0, None, str(error), steps=tuple(steps)) for steps in variants]

    common = {
        "format": _FORMAT,
        "code": _code(),
        "recipe": settled,
        "inputs": [identity(one) for one in ingredients],
        "base": encoder.fingerprint,
        "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
        "unlabelled": unlabelled,
    }

    def path(steps: Calibration, ending: str = ".safetensors") -> Path:
        read = {step: {name: rows.fingerprint() for name, rows in found.items()} for step, found in steps.items()}
        return folder / f"{fingerprint({**common, 'calibration': read})[:32]}{ending}"

    @functools.cache
    def merged() -> _Made:
        unfinished = dataclasses.replace(given, folder=path({}, ".run")) if given is not None else None
        return _measured(lambda: merge(ingredients, recipe, unfinished), path({}, ".model.safetensors"))

    cells: list[Cell] = []
    for steps in variants:
        cell = Cell(recipe, {}, 0.0, 0, None, steps=tuple(steps))
        if cells and cells[0].refused:
            cells.append(dataclasses.replace(cell, refused=cells[0].refused))
            continue
        kept = _read(path(steps), cell)
        if kept is None:
            scratch = path(steps, ".model.safetensors")
            kept = _run(cell, merged, _calibrated(steps, ingredients, encoder), scratch, encoder, tasks)
            if not kept.refused:
                _write(path(steps), kept)
        cells.append(kept)
    return cells


def _settled(recipe: Recipe, ingredients: Sequence[Ingredient]) -> Recipe:
    """``recipe`` with all that it leaves to defaults; raises an MbertError for one that these inputs do not allow."""
    recipe.check(ingredients)
    recipe = dataclasses.replace(recipe, inputs=())
    if recipe.method == ENSEMBLE:
        return recipe
    method = METHODS.get(recipe.method)
    options = dataclasses.asdict(make_options(method, recipe.options))
    return dataclasses.replace(recipe, options=options, weights=chosen_weights(method, ingredients, recipe.weights))


@functools.cache
def _code() -> dict[str, str]:
    """A SHA-256 over the source that decides what a merge answers, and versions: what a cell owes to the code."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [file for name in _DECIDING for file in (sorted((root / name).rglob("*.py")) or [root / name])]
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()};".encode() + file.read_bytes())
    return {"source": digest.hexdigest(), **{name: version(name) for name in ("torch", "transformers")}}


@dataclass(frozen=True)
class _Made:
    """A model, the seconds and bytes of memory that it took, and the bytes of its file."""

    model: Model
    seconds: float
    memory: int | None
    size: int


def _measured(make: Callable[[], Model], scratch: Path) -> _Made:
    start = time.monotonic()
    try:
        with memory_meter() as meter:
            model = make()
            seconds = time.monotonic() - start
            write_model(scratch, model)  # type: ignore[arg-type]
        return _Made(model, seconds, meter.above, scratch.stat().st_size)
    finally:
        remove(scratch)


def _calibrated(
    steps: Calibration, ingredients: Sequence[Ingredient], encoder: Encoder
) -> Callable[[Model], Model] | None:
    """What calibrates a merge; None for no steps."""

    def change(model: Model) -> Model:
        assert isinstance(model, Merged)
        if "scales" in steps:
            model = calibrate_scales(model, ingredients, encoder, steps["scales"])
        return calibrate_heads(model, encoder, steps["heads"]) if "heads" in steps else model

    return change if steps else None


def _run(
    cell: Cell,
    merged: Callable[[], _Made],
    calibrated: Callable[[Model], Model] | None,
    scratch: Path,
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
) -> Cell:
    """``cell`` with what the merge gave; refused, where an error of the merge or of its calibration says so."""
    try:
        made = merged()
        if calibrated is not None:
            before = made
            made = _measured(lambda: calibrated(before.model), scratch)
            memory = None if before.memory is None or made.memory is None else max(before.memory, made.memory)
            made = _Made(made.model, before.seconds + made.seconds, memory, made.size)
        if isinstance(made.model, Merged):
            refuse_seen(cell.name, made.model, {name: rows for name, (_, rows) in tasks.items()})
        predictor = Predictor(made.model, encoder)
        outputs = {name: predictor.outputs(name, rows) for name, (_, rows) in tasks.items()}
        for name, found in outputs.items():
            if not np.isfinite(found).all():
                raise OutputError(cell.name, f"answers to {name} that are not finite", "numbers", "use smaller weights")
    except MbertError as error:
        return dataclasses.replace(cell, refused=str(error))
    learned = dict(made.model.trace.get("learned", {})) if isinstance(made.model, Merged) else {}
    return dataclasses.replace(
        cell, outputs=outputs, seconds=made.seconds, size=made.size, memory=made.memory, learned=learned
    )


def _write(path: Path, cell: Cell) -> None:
    told = {"seconds": cell.seconds, "size": cell.size, "memory": cell.memory, "learned": dict(cell.learned)}
    write_tensors(path, {f"outputs.{name}": torch.from_numpy(values) for name, values in cell.outputs.items()}, told)


def _read(path: Path, cell: Cell) -> Cell | None:
    """``cell`` as it was finished before; None where it was not, or its file is broken."""
    if not path.exists():
        return None
    try:
        tensors, told = read_tensors(path)
        outputs = {name.removeprefix("outputs."): tensor.numpy() for name, tensor in tensors.items()}
        seconds, size, learned = float(told["seconds"]), int(told["size"]), told.get("learned", {})
    except (ModelFileError, KeyError, TypeError, ValueError):
        return None
    found = {"outputs": outputs, "seconds": seconds, "size": size, "memory": told["memory"], "learned": learned}
    return dataclasses.replace(cell, **found)


def comparison_of(ingredients: Sequence[Ingredient], encoder: Encoder, tasks: Mapping[str, tuple[Task, Rows]]) -> str:
    """What two tables must share to be of one comparison: inputs, base and rows to score on, as one SHA-256 (hex)."""
    rows = {name: rows.fingerprint() for name, (_, rows) in tasks.items()}
    return fingerprint([[identity(one) for one in ingredients], encoder.fingerprint, rows])


def refuse_other(folder: Path, comparison: str, force: bool) -> None:
    """Raise OutputError where ``folder`` has results of another comparison, or of anything else, unless ``force``."""
    try:
        known = json.loads((folder / RESULTS[0]).read_text(encoding="utf-8"))["comparison"]
    except (OSError, ValueError, LookupError, TypeError):
        known = None
    for path in (folder / name for name in RESULTS):
        if known != comparison and path.exists() and not force:
            raise OutputError(
                str(path),
                "it is of other inputs or rows",
                "a folder of its own",
                "choose another --out or give --force",
            )


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
    """The finished cells, the best overall first; the reference is the ensemble, where it was not refused.

    Raises CompositionError where every cell was refused.
    """
    finished = [cell for cell in cells if not cell.refused]
    if not finished:
        reasons = "; ".join(dict.fromkeys(f"{cell.name}: {cell.refused}" for cell in cells[:2]))
        raise CompositionError(
            "compare", f"every merge was refused ({reasons})", "one that works", "give other inputs or methods"
        )
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
    whole = next((figures[id(cell)] for cell in finished if cell.recipe.method == ENSEMBLE), None)
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
        kept = {name: retention(own[name], whole[name] if whole else None) for name in own}
        kept["overall"] = retention(overall(own), overall(whole) if whole else None)
        placed.append(Standing(cell, own, overall(own), kept, (float(low), float(high))))
    return sorted(placed, key=lambda one: (-one.overall, one.cell.name))


@dataclass(frozen=True)
class Contest:
    """The standings, the best first, full fine-tuning's figures where they are recorded, and what was left out.

    ``on`` says which rows were scored (:data:`DEV` or :data:`HELD_OUT`), ``rows`` how many of each task.
    """

    placed: Sequence[Standing]
    full: Mapping[str, float] | None
    refused: Mapping[str, str]
    on: str
    rows: Mapping[str, int]


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
        "standings": [
            {
                "name": one.cell.name,
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
