"""Recorded results: beside a model ``X`` lies ``X.scores.json`` with every figure measured on it, for later tables.

A figure is known by task, metric and the fingerprint of its rows; measuring again on other rows adds to the record.
A record of a model file that has since changed is not used.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_bert.composing.composition import Model
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.files import beside, file_fingerprint, write_json
from mergekit_bert.outputs import held
from mergekit_bert.schema import Name, Schema, SchemaError, Sha256, validate

SUFFIX = ".scores.json"
_FORMAT = 1
_BYTES = 4 * 2**20


class _File(Schema):
    """The layout of a record's file."""

    format: Annotated[int, Field(ge=_FORMAT, le=_FORMAT)]
    role: Name
    model: Name
    sha256: Sha256
    base: Name
    scores: tuple[Score, ...]
    adapter: Sha256 | None = None


@dataclass(frozen=True)
class Record:
    """The recorded figures of one model: its role (``adapter``, ``probe``, ``full``, …), file and base.

    ``adapter`` is the SHA-256 that the adapter has in today's format, where its file is of an older one.
    """

    role: str
    sha256: str
    base: str
    scores: tuple[Score, ...]
    path: Path
    adapter: str | None = None


def record_path(model_path: Path) -> Path:
    """Where the figures of the model at ``model_path`` are kept."""
    return beside(model_path, SUFFIX)


def write_record(model_path: Path, model: Model, scores: Sequence[Score]) -> None:
    """Add ``scores`` to the record of ``model_path``; figures on other rows stay."""
    path, sha256 = record_path(model_path), file_fingerprint(model_path)
    kept = {}
    with held(path, wait=True):  # another evaluation may be adding to it
        earlier = read_record(path)
        for score in (*(earlier.scores if earlier and earlier.sha256 == sha256 else ()), *scores):
            kept[score.task, score.metric, score.data] = dataclasses.asdict(score)
        told = {
            "format": _FORMAT,
            "role": model.role(),
            "model": model_path.name,
            "sha256": sha256,
            "base": model.base.fingerprint,
            "scores": [kept[key] for key in sorted(kept)],
        }
        if (today := model.sha256()) not in (None, sha256):
            told["adapter"] = today
        write_json(path, told)


def read_record(path: Path) -> Record | None:
    """The record at ``path``; None where there is none, or it is broken or out of date."""
    try:
        found = validate(_File, read_mapping(path, _BYTES))
        if Path(found.model).name != found.model or not _is_current(path.parent / found.model, found.sha256):
            return None
    except (OSError, DocumentError, SchemaError):
        return None
    return Record(found.role, found.sha256, found.base, found.scores, path, found.adapter)


def _is_current(model: Path, sha256: str) -> bool:
    """Whether the figures are still those of ``model``; where it is gone, they stay what they were."""
    if not model.exists():
        return True
    return (model.is_file() or (model.is_dir() and model.name != "..")) and file_fingerprint(model) == sha256


def find_records(folders: Sequence[Path]) -> list[Record]:
    """All records in ``folders``: folder by folder in the order given, by name inside one."""
    paths = dict.fromkeys(path.resolve() for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")))
    return [record for path in paths if (record := read_record(path)) is not None]
