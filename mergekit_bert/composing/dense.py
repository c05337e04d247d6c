"""Dense export: one plain Hugging Face folder per task, written one tensor at a time."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_bert.adapters.adapter import Tensors
from mergekit_bert.adapters.delta import Delta, apply
from mergekit_bert.adapters.file import check_base, provenance
from mergekit_bert.composing.composition import Composition, Ensemble, Merged, Own, find_task
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import FILES, folder_in_parts, folder_tokens, load_folder, read_folder
from mergekit_bert.encoder.forward import check_same_outputs, padded_outputs
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.stored import StoredEncoder
from mergekit_bert.outputs import Output, written

_CHECK = ("A short text.", "Another one, a little longer than the first, to be sure of the padding.")


def write_dense(
    folder: Path, model: Composition, encoder: Encoder, force: bool = False, only: Sequence[str] = ()
) -> list[Path]:
    """Write ``folder/<task>/`` for every task of ``model`` (or ``only`` some); returns the folders.

    Every weight is made once, for all tasks, and none is kept: with a stored encoder and a model that was merged
    lazily, the memory needed is that of a few tensors. Every file is read back; with a loaded encoder its outputs are
    compared too. Raises OutputError, ModelFileError.
    """
    model = model.on(encoder)
    tasks = [find_task(model, name) for name in only] or list(model.tasks)
    outputs = dense_outputs(folder, [task.name for task in tasks], force)
    with written(*outputs) as parts:
        stored = isinstance(encoder, StoredEncoder)
        expected = None if stored else Predictor(model, encoder)  # it checks that model and encoder fit
        if stored:
            check_base("model", model.base, encoder)
        shared = (model.deltas, model.shifts) if isinstance(model, Merged) else ({}, {})
        owns = [_own(model, task.name) for task in tasks]
        with contextlib.ExitStack() as open_folders:
            puts = [
                open_folders.enter_context(folder_in_parts(part, own.head, encoder, task, _record(model, task)))
                for part, task, own in zip(parts, tasks, owns, strict=True)
            ]
            for name, weight in encoder.weights.items():
                merged = _changed(name, weight, *shared)
                for put, own in zip(puts, owns, strict=True):
                    put(name, _changed(name, merged, own.deltas, own.shifts))
        if expected is not None:
            for part, task in zip(parts, tasks, strict=True):
                _check(part, task, expected)
    return [output.path for output in outputs]


def dense_outputs(folder: Path, tasks: Sequence[str], force: bool) -> list[Output]:
    """The folders that :func:`write_dense` writes for ``tasks``."""
    return [Output(folder / task, force, FILES) for task in tasks]


def _own(model: Composition, task: str) -> Own:
    """What a task does not share: of a merged model what it kept, of adapters everything."""
    if isinstance(model, Merged):
        return model.own[task]
    part = model.part(task)
    return Own(part.head, part.deltas, part.shifts)


def _changed(name: str, weight: Tensor, deltas: Mapping[str, Delta], shifts: Tensors) -> Tensor:
    """The parameter as it is with Deltas and shifts, as :func:`~mergekit_bert.adapters.attach.fold` makes it."""
    if name in shifts:
        return weight + shifts[name].to(weight.device)
    site = name.removesuffix(".weight")
    return apply(weight, deltas[site]) if site != name and site in deltas else weight


def _check(path: Path, task: Task, expected: Predictor) -> None:
    """Compare what transformers makes of the folder with what the model says."""
    rows = Rows(tuple((text,) * len(task.text) for text in _CHECK), None, "check")
    folder = read_folder(path)
    loaded, tokenizer = load_folder(folder)
    tokens = folder_tokens(folder, loaded, tokenizer, rows)
    check_same_outputs(str(path), expected.outputs(task.name, rows), padded_outputs(loaded, tokens))


def _record(model: Composition, task: Task) -> dict[str, Any]:
    """The folder's record: how its weights came about and which rows' labels they saw, the base, the cut of texts."""
    if isinstance(model, Merged):
        seen = [
            {"step": step, "fingerprint": fingerprint, "texts": sorted(hashes)}
            for step, name, fingerprint, hashes in model.seen()
            if name == task.name
        ]
        origin = {**model.parts[task.name], "method": model.method, "weights": dict(model.weights), "seen": seen}
    else:
        expert = model.experts[task.name] if isinstance(model, Ensemble) else model
        origin = {**provenance(expert), "method": type(model).__name__.lower()}
    return {**origin, "kind": "dense", "base": dataclasses.asdict(model.base)}
