"""Dense export: one plain Hugging Face folder per task, checked to give the same outputs."""

import dataclasses
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.file import provenance
from mergekit_bert.composing.composition import Composition, Ensemble, Merged
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.folder import load_folder, read_folder, write_folder
from mergekit_bert.encoder.forward import check_same_outputs, padded_outputs
from mergekit_bert.encoder.heads import classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.files import refuse_existing, withdrawn

_CHECK = ("A short text.", "Another one, a little longer than the first, to be sure of the padding.")


def write_dense(folder: Path, model: Composition, encoder: Encoder, force: bool = False) -> list[Path]:
    """Write ``folder/<task>/`` for every task of ``model``; returns the folders. Raises OutputError, ModelFileError."""
    paths = [folder / task.name for task in model.tasks]
    for path in paths:
        refuse_existing(path, force)
    expected = Predictor(model, encoder)
    for path, task in zip(paths, model.tasks, strict=True):
        part = model.part(task.name)
        whole = classifier(fold(encoder, part.deltas, part.shifts), task, part.head)
        record = {
            **_origin(model, task.name),
            "kind": "dense",
            "base": dataclasses.asdict(model.base),
            "max_length": part.max_length,
        }
        write_folder(path, whole, encoder, task, record)
        rows = Rows(tuple((text,) * len(task.text) for text in _CHECK), None, "check")
        with withdrawn(path):
            loaded, tokenizer = load_folder(read_folder(path))
            tokens = tokenise(rows, task, tokenizer, part.max_length, int(tokenizer.pad_token_id or 0))
            check_same_outputs(str(path), expected.outputs(task.name, rows), padded_outputs(loaded, tokens))
    return paths


def _origin(model: Composition, task: str) -> dict[str, Any]:
    """How the folder's weights came about: the method, and the provenance of the task's adapter."""
    if isinstance(model, Merged):
        return {**model.parts[task], "method": model.method, "weights": dict(model.weights)}
    expert = model.experts[task] if isinstance(model, Ensemble) else model
    return {**provenance(expert), "method": type(model).__name__.lower()}
