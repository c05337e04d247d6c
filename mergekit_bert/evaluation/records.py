"""Recorded scores: ``X.scores.json`` beside a model ``X`` has every score measured for it, for later tables.

Scores are stored by task, metric and fingerprint of the rows; an evaluation on other rows adds to the record. A record
is not used if the model file has changed since.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.files import beside, file_fingerprint, write_json
from mergekit_bert.models.composition import Model
from mergekit_bert.outputs import held
from mergekit_bert.schema import Name, Schema, SchemaError, Sha256, validate

SUFFIX = ".scores.json"
_FORMAT = 1
_BYTES = 4 * 2**20


class _File(Schema):
    """The layout of the file."""

    format: Annotated[int, Field(ge=_FORMAT, le=_FORMAT)]
    role: Name
    model: Name
    sha256: Sha256
    base: Name
    scores: tuple[Score, ...]
    adapter: Sha256 | None = None


@dataclass(frozen=True)
class Record:
    """The recorded scores of one model, with its role (``adapter``, ``probe``, ``full``, …), file and base.

    ``adapter`` is the SHA-256 of the adapter in the current format, if its file has an older one.
    """

    role: str
    sha256: str
    base: str
    scores: tuple[Score, ...]
    path: Path
    adapter: str | None = None


def record_path(model_path: Path) -> Path:
    """The path of the record of the model at ``model_path``."""
    return beside(model_path, SUFFIX)


def write_record(model_path: Path, model: Model, scores: Sequence[Score]) -> None:
    """Add ``scores`` to the record of ``model_path``; scores on other rows are kept."""
    path, sha256 = record_path(model_path), file_fingerprint(model_path)
    kept = {}
    with held(path, wait=True):  # another evaluation may be adding to it
        earlier = read_record(path)
        for score in (*(earlier.scores if earlier and earlier.sha256 == sha256 else ()), *scores):
            kept[score.task, score.metric, score.data] = dataclasses.asdict(score)
        record = {
            "format": _FORMAT,
            "role": model.role(),
            "model": model_path.name,
            "sha256": sha256,
            "base": model.base.fingerprint,
            "scores": [kept[key] for key in sorted(kept)],
        }
        if (current := model.sha256()) not in (None, sha256):
            record["adapter"] = current
        write_json(path, record)


def read_record(path: Path) -> Record | None:
    """The record at ``path``; None if there is none, or it is broken or out of date."""
    try:
        stored = validate(_File, read_mapping(path, _BYTES))
        if Path(stored.model).name != stored.model or not _is_current(path.parent / stored.model, stored.sha256):
            return None
    except (OSError, DocumentError, SchemaError):
        return None
    return Record(stored.role, stored.sha256, stored.base, stored.scores, path, stored.adapter)


def _is_current(model: Path, sha256: str) -> bool:
    """Whether the scores are those of the file as it is now; if the file is gone, they remain valid."""
    if not model.exists():
        return True
    return (model.is_file() or (model.is_dir() and model.name != "..")) and file_fingerprint(model) == sha256


def find_records(folders: Sequence[Path]) -> list[Record]:
    """All records in ``folders``, in the order of the folders and sorted by name within each."""
    paths = dict.fromkeys(path.resolve() for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")))
    return [record for path in paths if (record := read_record(path)) is not None]
