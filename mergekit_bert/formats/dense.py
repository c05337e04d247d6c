"""Dense export: one plain Hugging Face folder per task, written one tensor at a time."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.attach import patched
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import FILES, folder_in_parts, folder_tokens, in_units, load_folder, read_folder
from mergekit_bert.encoder.forward import check_same_outputs, padded_outputs
from mergekit_bert.encoder.load import Encoder, check_base
from mergekit_bert.encoder.stored import StoredEncoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.models.composition import Composition, find_task
from mergekit_bert.models.prediction import Predictor
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
    _check_extras(model)
    tasks = [find_task(model, name) for name in only] or list(model.tasks)
    outputs = dense_outputs(folder, [task.name for task in tasks], force)

    def record(task: Task) -> dict[str, Any]:
        """How the folder's weights came about, and the base."""
        return {**model.origin(task.name), "kind": "dense", "base": dataclasses.asdict(model.base)}

    with written(*outputs) as parts:
        stored = isinstance(encoder, StoredEncoder)
        expected = None if stored else Predictor(model, encoder)  # it checks that model and encoder fit
        if stored:
            check_base("model", model.base, encoder)
        shared, owns = model.shared, [model.own_part(task.name) for task in tasks]
        with contextlib.ExitStack() as open_folders:
            puts = [
                open_folders.enter_context(folder_in_parts(part, own.head, encoder, task, record(task)))
                for part, task, own in zip(parts, tasks, owns, strict=True)
            ]
            for name, weight in encoder.weights.items():
                merged = patched(name, weight, shared)
                for put, own in zip(puts, owns, strict=True):
                    put(name, patched(name, merged, own))
        if expected is not None:
            for part, task in zip(parts, tasks, strict=True):
                _check(part, task, expected)
    return [output.path for output in outputs]


def _check_extras(model: Composition) -> None:
    """Raise CompositionError for a model with extras: transformers' encoders have no place for them."""
    for task in model.tasks:
        if extras := model.own_part(task.name).extras:
            raise CompositionError(
                f"task {task.name!r}",
                f"a {' and a '.join(extras)}",
                "weights alone, for a Hugging Face folder",
                "keep it as a file of mbert's",
            )


def dense_outputs(folder: Path, tasks: Sequence[str], force: bool) -> list[Output]:
    """The folders that :func:`write_dense` writes for ``tasks``."""
    return [Output(folder / task, force, FILES) for task in tasks]


def _check(path: Path, task: Task, expected: Predictor) -> None:
    """Compare what transformers makes of the folder with what the model says."""
    rows = Rows(tuple((text,) * len(task.text) for text in _CHECK), None, "check")
    folder = read_folder(path)
    loaded, tokenizer = load_folder(folder)
    tokens = folder_tokens(folder, loaded, tokenizer, rows)
    check_same_outputs(
        str(path), expected.outputs(task.name, rows), in_units(loaded, padded_outputs(loaded, tokens), task)
    )
