"""Cells: one set of adapters merged by one recipe, the merge's answers to the rows of all tasks, and what it cost.

A finished cell is one file, known by a fingerprint of everything that determines it, and never computed twice.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from mergekit_bert.composing.calibration import calibrate_heads, calibrate_scales
from mergekit_bert.composing.composition import Ensemble, Merged
from mergekit_bert.composing.file import write_model
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.merging import MergeContext, merge, merge_weights, reads_rows
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe, settled
from mergekit_bert.composing.source import made_by
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import MbertError, ModelFileError, OutputError
from mergekit_bert.evaluation.evaluate import refuse_seen
from mergekit_bert.files import fingerprint, remove
from mergekit_bert.hardware import memory_meter
from mergekit_bert.registry import unknown
from mergekit_bert.schema import Count, Finite, Name, Plain, Schema, SchemaError, validate
from mergekit_bert.tensorfile import read_tensors, write_tensors

_FORMAT = 3

Calibration = Mapping[str, Mapping[str, Rows]]
"""Rows of every task by step (``scales``, ``heads``), in the order in which the steps are taken; empty: none is."""


@dataclass(frozen=True)
class Cell:
    """One merge and what it gave: ``outputs`` of every task's rows, seconds and bytes of the merge, or why not.

    ``learned`` is what a method that learns tells of it; ``steps`` are those of a calibration after the merge; ``key``
    is what its file is known by.
    """

    recipe: Recipe
    outputs: Mapping[str, Float[np.ndarray, "rows out"]]
    seconds: float
    size: int
    memory: int | None
    refused: str = ""
    learned: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    key: str = ""

    @property
    def name(self) -> str:
        """The method, space, rank, seed and rank of remainders where not the default ones, and the steps afterwards."""
        space = "" if self.recipe.space == "full" else f" in {self.recipe.space}"
        rank = f" rank {self.recipe.rank}" if self.recipe.rank else ""
        seed = f" seed {self.recipe.seed}" if self.recipe.seed else ""
        private = [f"private {self.recipe.private}"] if self.recipe.private else []
        return " + ".join([f"{self.recipe.method}{space}{rank}{seed}", *private, *self.steps])

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method needs beyond the Deltas, and what calibration does."""
        own = () if self.recipe.method == ENSEMBLE else METHODS.get(self.recipe.method).needs
        more = {"scales": "rows", "heads": "labels"}
        return tuple(dict.fromkeys([*own, *(more[step] for step in self.steps)]))


def recipes_for(
    methods: Sequence[str],
    spaces: Sequence[str] | None = None,
    seed: int = 0,
    rank: int | None = None,
    private: int | None = None,
) -> list[Recipe]:
    """The ensemble, then a recipe for every method in each of ``spaces`` (None: all) that makes a difference.

    The seed is for those that draw from it: the others would make the same merge again. Raises UnknownNameError for a
    method or space that does not exist.
    """
    records = [METHODS.get(name) for name in methods]
    for space in spaces or ():
        if space not in SPACES:
            raise unknown("space", space, list(SPACES))
    found = [Recipe(ENSEMBLE)]
    for method in records:
        own = ("full",) if method.linear else method.spaces
        chosen = [space for space in own if spaces is None or space in spaces]
        drawn = seed if method.random else 0
        found += [Recipe(method.name, space, seed=drawn, rank=rank, private=private) for space in chosen]
    return found


def run_cells(
    recipe: Recipe,
    merge_inputs: Sequence[MergeInput],
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
    given: MergeContext | None,
    folder: Path,
    calibration: Calibration | None = None,
) -> list[Cell]:
    """The cell of ``recipe`` scored on ``tasks``, and with ``calibration`` that of the same merge calibrated.

    Each is read where it was finished before, else computed and kept in ``folder``; what is merged is merged once. A
    cell is known by the inputs, the base, the rows scored on and those learned or calibrated on, by the recipe with
    every option and weight that it does not name, by the processor and the versions of torch and transformers, and by
    the source of mbert's merging, adapters, encoder and data. So a changed default or method is a new cell, a changed
    table is not.
    """
    variants: list[Calibration] = [{}]
    if calibration and recipe.method != ENSEMBLE:
        variants.append(calibration)
    reads = given is not None and recipe.method in METHODS.names() and reads_rows(recipe, merge_inputs)
    unlabelled = {name: given.rows(name).fingerprint() for name in tasks} if given is not None and reads else {}
    try:
        known = settled(recipe, merge_inputs).to_json()
    except MbertError as error:
        return [Cell(recipe, {}, 0.0, 0, None, str(error), steps=tuple(steps)) for steps in variants]

    common = {
        "format": _FORMAT,
        "made_by": made_by(),
        "recipe": known,
        "inputs": [one.identify() for one in merge_inputs],
        "base": encoder.fingerprint,
        "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
        "unlabelled": unlabelled,
    }

    def key(steps: Calibration) -> str:
        read = {step: {name: rows.fingerprint() for name, rows in found.items()} for step, found in steps.items()}
        return fingerprint({**common, "calibration": read})[:32]

    def place(steps: Calibration) -> Path:
        return folder / f"{key(steps)}.model.safetensors"

    @functools.cache
    def merged() -> _Made[Merged]:
        unfinished = dataclasses.replace(given, folder=folder / f"{key({})}.run") if given is not None else None
        return _measured(lambda: merge_weights(merge_inputs, recipe, unfinished), place({}))

    def made(steps: Calibration) -> _Made[Any]:
        if recipe.method == ENSEMBLE:
            return _measured(lambda: merge(merge_inputs, recipe), place({}))
        return _calibrated(merged(), steps, merge_inputs, encoder, place(steps)) if steps else merged()

    cells: list[Cell] = []
    for steps in variants:
        cell = Cell(recipe, {}, 0.0, 0, None, steps=tuple(steps), key=key(steps))
        if cells and cells[0].refused:
            cells.append(dataclasses.replace(cell, refused=cells[0].refused))
            continue
        kept = read_cell(folder, cell, tasks)
        if kept is None:
            kept = _run(cell, functools.partial(made, steps), encoder, tasks)
            if not kept.refused:
                _write(folder, kept)
        cells.append(kept)
    return cells


M = TypeVar("M", bound=Merged | Ensemble)


@dataclass(frozen=True)
class _Made(Generic[M]):
    """A model, the seconds and bytes of memory that it took, and the bytes of its file."""

    model: M
    seconds: float
    memory: int | None
    size: int


def _measured(make: Callable[[], M], scratch: Path) -> _Made[M]:
    start = time.monotonic()
    try:
        with memory_meter() as meter:
            model = make()
            seconds = time.monotonic() - start
            write_model(scratch, model)
        return _Made(model, seconds, meter.above, scratch.stat().st_size)
    finally:
        remove(scratch)


def _calibrated(
    made: _Made[Merged], steps: Calibration, merge_inputs: Sequence[MergeInput], encoder: Encoder, scratch: Path
) -> _Made[Merged]:
    """A merge after the ``steps`` of a calibration, with what both took."""

    def change() -> Merged:
        model = made.model
        if "scales" in steps:
            model = calibrate_scales(model, merge_inputs, encoder, steps["scales"])
        return calibrate_heads(model, encoder, steps["heads"]) if "heads" in steps else model

    after = _measured(change, scratch)
    memory = None if made.memory is None or after.memory is None else max(made.memory, after.memory)
    return _Made(after.model, made.seconds + after.seconds, memory, after.size)


def _run(cell: Cell, make: Callable[[], _Made[Any]], encoder: Encoder, tasks: Mapping[str, tuple[Task, Rows]]) -> Cell:
    """``cell`` with what the merge gave; refused, where an error of the merge or of its calibration says so."""
    try:
        made = make()
        refuse_seen(cell.name, made.model.seen(), {name: rows for name, (_, rows) in tasks.items()})
        predictor = Predictor(made.model, encoder)
        outputs = {name: predictor.outputs(name, rows) for name, (_, rows) in tasks.items()}
        for name, found in outputs.items():
            if not np.isfinite(found).all():
                raise OutputError(cell.name, f"answers to {name} that are not finite", "numbers", "use smaller weights")
    except MbertError as error:
        return dataclasses.replace(cell, refused=str(error))
    learned = dict(made.model.trace.get("learned", {}))
    return dataclasses.replace(
        cell, outputs=outputs, seconds=made.seconds, size=made.size, memory=made.memory, learned=learned
    )


def _write(folder: Path, cell: Cell) -> None:
    told = {
        "key": cell.key,
        "seconds": cell.seconds,
        "size": cell.size,
        "memory": cell.memory,
        "learned": dict(cell.learned),
    }
    outputs = {f"outputs.{name}": torch.from_numpy(values) for name, values in cell.outputs.items()}
    write_tensors(folder / f"{cell.key}.safetensors", outputs, told)


class _File(Schema):
    """The metadata of a cell's file; ``key`` is its name, so that no file stands in for another."""

    key: Name
    seconds: Annotated[Finite, Field(ge=0)]
    size: Count
    memory: Count | None
    learned: dict[Name, Plain] = Field(default_factory=dict)


def read_cell(folder: Path, cell: Cell, tasks: Mapping[str, tuple[Task, Rows]]) -> Cell | None:
    """``cell`` as it was finished before on ``tasks``; None where it was not, or its file is broken."""
    path = folder / f"{cell.key}.safetensors"
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        found = validate(_File, metadata)
    except (ModelFileError, SchemaError):
        return None
    outputs = {name.removeprefix("outputs."): tensor.numpy() for name, tensor in tensors.items()}
    shapes = {name: (len(rows), task.outputs) for name, (task, rows) in tasks.items()}
    if found.key != cell.key or {name: values.shape for name, values in outputs.items()} != shapes:
        return None
    return dataclasses.replace(cell, outputs=outputs, **found.model_dump())
