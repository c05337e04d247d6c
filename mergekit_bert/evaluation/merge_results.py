"""Merge results: adapters merged by one recipe, the outputs of the merge for the rows of all tasks, and its cost.

Each result is cached in one file under a fingerprint of everything that determines it, and never computed twice.
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
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.merging import MergeContext, merge, merge_weights, reads_rows
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe, settled
from mergekit_bert.composing.source import made_by
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import MbertError, ModelFileError, OutputError
from mergekit_bert.evaluation.evaluate import refuse_seen
from mergekit_bert.files import fingerprint, remove
from mergekit_bert.formats.file import write_model
from mergekit_bert.hardware import memory_meter
from mergekit_bert.models.composition import Ensemble, Merged
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.registry import unknown
from mergekit_bert.schema import Count, Finite, Name, Plain, Schema, SchemaError, validate
from mergekit_bert.tensorfile import read_tensors, write_tensors

_FORMAT = 3

Calibration = Mapping[str, Mapping[str, Rows]]
"""Rows of every task by calibration step (``scales``, ``heads``), in the order of the steps; empty: no calibration."""


@dataclass(frozen=True)
class MergeResult:
    """One merge: ``outputs`` for the rows of every task, and the cost; or why it was ``refused``.

    ``size`` is the size of the merged file in bytes, ``memory`` the rise of the process's peak memory in bytes.
    ``learned`` is what a method that learns reports about its training. ``steps`` are the calibration steps after the
    merge. ``key`` is the fingerprint under which the result is cached.
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
        """The method; space, rank, seed and rank of the residuals unless default; and the calibration steps."""
        space = "" if self.recipe.space == "full" else f" in {self.recipe.space}"
        rank = f" rank {self.recipe.rank}" if self.recipe.rank else ""
        seed = f" seed {self.recipe.seed}" if self.recipe.seed else ""
        private = [f"private {self.recipe.private}"] if self.recipe.private else []
        return " + ".join([f"{self.recipe.method}{space}{rank}{seed}", *private, *self.steps])

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method and the calibration need beyond the Deltas."""
        of_method = () if self.recipe.method == ENSEMBLE else METHODS.get(self.recipe.method).needs
        of_step = {"scales": "rows", "heads": "labels"}
        return tuple(dict.fromkeys([*of_method, *(of_step[step] for step in self.steps)]))


def recipes_for(
    methods: Sequence[str],
    spaces: Sequence[str] | None = None,
    seed: int = 0,
    rank: int | None = None,
    private: int | None = None,
) -> list[Recipe]:
    """The ensemble, then a recipe for every method in each of ``spaces`` (None: all) in which it gives another result.

    Only methods that draw random numbers get the seed, because it would not change the others. Raises UnknownNameError
    for an unknown method or space.
    """
    records = [METHODS.get(name) for name in methods]
    for space in spaces or ():
        if space not in SPACES:
            raise unknown("space", space, list(SPACES))
    recipes = [Recipe(ENSEMBLE)]
    for method in records:
        distinct = ("full",) if method.linear else method.spaces
        chosen = [space for space in distinct if spaces is None or space in spaces]
        method_seed = seed if method.random else 0
        recipes += [Recipe(method.name, space, seed=method_seed, rank=rank, private=private) for space in chosen]
    return recipes


def run_recipe(
    recipe: Recipe,
    merge_inputs: Sequence[MergeInput],
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
    context: MergeContext | None,
    folder: Path,
    calibration: Calibration | None = None,
) -> list[MergeResult]:
    """The result of ``recipe`` on the rows of ``tasks``; with ``calibration``, also that of the same merge calibrated.

    Results are read from the cache in ``folder``, or computed and stored there; both share one merge. The cache key
    covers the inputs, the base, the rows scored on and those used for learning or calibrating, the recipe with all its
    options and weights including defaults, the processor, the versions of torch and transformers, and the source code
    of mbert's merging, adapters, encoder and data. So a changed default or method gives a new result; a changed table
    does not.
    """
    variants: list[Calibration] = [{}]
    if calibration and recipe.method != ENSEMBLE:
        variants.append(calibration)
    reads = context is not None and recipe.method in METHODS.names() and reads_rows(recipe, merge_inputs)
    unlabelled = {name: context.rows(name).fingerprint() for name in tasks} if context is not None and reads else {}
    try:
        complete = settled(recipe, merge_inputs).to_json()
    except MbertError as error:
        return [MergeResult(recipe, {}, 0.0, 0, None, str(error), steps=tuple(steps)) for steps in variants]

    common = {
        "format": _FORMAT,
        "made_by": made_by(),
        "recipe": complete,
        "inputs": [merge_input.identify() for merge_input in merge_inputs],
        "base": encoder.fingerprint,
        "rows": {name: rows.fingerprint() for name, (_, rows) in tasks.items()},
        "unlabelled": unlabelled,
    }

    def key(steps: Calibration) -> str:
        used = {step: {name: rows.fingerprint() for name, rows in by_task.items()} for step, by_task in steps.items()}
        return fingerprint({**common, "calibration": used})[:32]

    def scratch_file(steps: Calibration) -> Path:
        return folder / f"{key(steps)}.model.safetensors"

    @functools.cache
    def merged() -> _Measured[Merged]:
        resumable = dataclasses.replace(context, folder=folder / f"{key({})}.run") if context is not None else None
        return _measured(lambda: merge_weights(merge_inputs, recipe, resumable), scratch_file({}))

    def make(steps: Calibration) -> _Measured[Any]:
        if recipe.method == ENSEMBLE:
            return _measured(lambda: merge(merge_inputs, recipe), scratch_file({}))
        return _calibrated(merged(), steps, merge_inputs, encoder, scratch_file(steps)) if steps else merged()

    results: list[MergeResult] = []
    for steps in variants:
        unfinished = MergeResult(recipe, {}, 0.0, 0, None, steps=tuple(steps), key=key(steps))
        if results and results[0].refused:
            results.append(dataclasses.replace(unfinished, refused=results[0].refused))
            continue
        result = read_result(folder, unfinished, tasks)
        if result is None:
            result = _compute(unfinished, functools.partial(make, steps), encoder, tasks)
            if not result.refused:
                _write(folder, result)
        results.append(result)
    return results


M = TypeVar("M", bound=Merged | Ensemble)


@dataclass(frozen=True)
class _Measured(Generic[M]):
    """A model, the seconds and bytes of memory that making it took, and the size of its file in bytes."""

    model: M
    seconds: float
    memory: int | None
    size: int


def _measured(make: Callable[[], M], scratch: Path) -> _Measured[M]:
    start = time.monotonic()
    try:
        with memory_meter() as meter:
            model = make()
            seconds = time.monotonic() - start
            write_model(scratch, model)
        return _Measured(model, seconds, meter.above, scratch.stat().st_size)
    finally:
        remove(scratch)


def _calibrated(
    merged: _Measured[Merged], steps: Calibration, merge_inputs: Sequence[MergeInput], encoder: Encoder, scratch: Path
) -> _Measured[Merged]:
    """The merge after the calibration ``steps``, with the cost of both."""

    def calibrate() -> Merged:
        model = merged.model
        if "scales" in steps:
            model = calibrate_scales(model, merge_inputs, encoder, steps["scales"])
        return calibrate_heads(model, encoder, steps["heads"]) if "heads" in steps else model

    after = _measured(calibrate, scratch)
    memory = None if merged.memory is None or after.memory is None else max(merged.memory, after.memory)
    return _Measured(after.model, merged.seconds + after.seconds, memory, after.size)


def _compute(
    unfinished: MergeResult,
    make: Callable[[], _Measured[Any]],
    encoder: Encoder,
    tasks: Mapping[str, tuple[Task, Rows]],
) -> MergeResult:
    """``unfinished`` completed by merging; refused if the merge or its calibration raises an MbertError."""
    try:
        made = make()
        refuse_seen(unfinished.name, made.model.seen(), {name: rows for name, (_, rows) in tasks.items()})
        predictor = Predictor(made.model, encoder)
        outputs = {name: predictor.outputs(name, rows) for name, (_, rows) in tasks.items()}
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                raise OutputError(
                    unfinished.name, f"outputs for {name} that are not finite", "finite numbers", "use smaller weights"
                )
    except MbertError as error:
        return dataclasses.replace(unfinished, refused=str(error))
    learned = dict(made.model.trace.get("learned", {}))
    return dataclasses.replace(
        unfinished, outputs=outputs, seconds=made.seconds, size=made.size, memory=made.memory, learned=learned
    )


def _write(folder: Path, result: MergeResult) -> None:
    metadata = {
        "key": result.key,
        "seconds": result.seconds,
        "size": result.size,
        "memory": result.memory,
        "learned": dict(result.learned),
    }
    outputs = {f"outputs.{name}": torch.from_numpy(values) for name, values in result.outputs.items()}
    write_tensors(folder / f"{result.key}.safetensors", outputs, metadata)


class _File(Schema):
    """The metadata of a cached result; ``key`` must match the file's name, so that no file is taken for another."""

    key: Name
    seconds: Annotated[Finite, Field(ge=0)]
    size: Count
    memory: Count | None
    learned: dict[Name, Plain] = Field(default_factory=dict)


def read_result(folder: Path, unfinished: MergeResult, tasks: Mapping[str, tuple[Task, Rows]]) -> MergeResult | None:
    """``unfinished`` completed from the cache in ``folder``; None if it is not there or its file is broken."""
    path = folder / f"{unfinished.key}.safetensors"
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        stored = validate(_File, metadata)
    except (ModelFileError, SchemaError):
        return None
    outputs = {name.removeprefix("outputs."): tensor.numpy() for name, tensor in tensors.items()}
    shapes = {name: (len(rows), task.outputs) for name, (task, rows) in tasks.items()}
    if stored.key != unfinished.key or {name: values.shape for name, values in outputs.items()} != shapes:
        return None
    return dataclasses.replace(unfinished, outputs=outputs, **stored.model_dump())
