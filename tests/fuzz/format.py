"""What a format is: valid files, how each of their kinds is changed, and what a user does with one that was read."""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.base import encoder_of
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.models.composition import Model
from mergekit_bert.models.prediction import Prediction, Predictor, mixed_table
from tests.composing.helpers import trio
from tests.fuzz.source import Kind
from tests.tiny import tiny_rows

BASE = Path("base")
"""The folder of the base, seen from where a case runs."""
TEXTS = ("a good film", "the cat sees a dog")


class UnsoundError(Exception):
    """Something was accepted that gives an answer nobody should see."""


class Workshop:
    """What all formats use: the tiny base, adapters of three tasks on it, and rows."""

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The base."""
        return load_encoder(BASE)

    @functools.cached_property
    def trio(self) -> Sequence[Adapter]:
        """Adapters of sst, sts and para on rows of one basis."""
        return trio(self.encoder)

    @functools.cached_property
    def spare(self) -> Adapter:
        """The adapter of para, with statistics, which is in no file: what others are merged with."""
        return measured(self.encoder, self.trio[2])

    def load(self, name: str) -> Encoder:
        """The base called ``name``, loaded once if it is the right one."""
        return self.encoder if name == str(BASE) else load_encoder(name)

    def rows(self, task: str, count: int = 12, seed: int = 0) -> Rows:
        """Labelled rows."""
        return tiny_rows(get_task(task), count, seed)


def measured(encoder: Encoder, adapter: Adapter) -> Adapter:
    """``adapter`` with Gram matrices and Fisher information of a few rows."""
    rows = [tiny_rows(adapter.task, 12)]
    found = {kind: collect(kind, encoder, [adapter.part(adapter.name)], rows) for kind in ("gram", "fisher")}
    return dataclasses.replace(adapter, statistics=found)


Use = Callable[[Workshop, Path], Iterator[tuple[str, Any]]]
"""What a user does with the files in a folder, stage by stage: the name of each, once it is done, and what it gave."""


@dataclass(frozen=True)
class Format:
    """A format that mbert reads.

    ``specimens`` make valid files in an empty folder, ``targets`` says by what kind of change each of the files is
    spoiled (the first pattern of its name counts). ``digest``: the files bear one over all that they say.
    ``share`` is how many cases it gets beside others.
    """

    name: str
    specimens: Mapping[str, Callable[[Workshop, Path], None]]
    targets: Mapping[str, Kind]
    use: Use
    share: int = 1
    digest: bool = False

    def kind_of(self, file: str) -> Kind | None:
        """How ``file`` is changed; None: not at all."""
        return next((kind for pattern, kind in self.targets.items() if fnmatch.fnmatch(file, pattern)), None)


def digest(value: Any) -> str:
    """SHA-256 (hex) of anything that a stage gives, to the bit."""
    found = hashlib.sha256()
    _feed(found.update, value)
    return found.hexdigest()


def _feed(put: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().float().numpy()
    if isinstance(value, np.ndarray):
        put(f"{value.dtype} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(put, {one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        put(b"{")
        for key in value:
            _feed(put, key)
            _feed(put, value[key])
        put(b"}")
    elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        put(b"[")
        for one in sorted(map(str, value)) if isinstance(value, set | frozenset) else value:
            _feed(put, one)
        put(b"]")
    else:
        put(f"{type(value).__name__} {value!r};".encode("utf-8", "backslashreplace"))


def shown(text: str) -> str:
    """``text`` as printed; UnsoundError for what could steer a terminal."""
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t":
            raise UnsoundError(f"{letter!r} in what is shown")
    return text


def strict_json(value: Any) -> str:
    """``value`` as printed with ``--json``; UnsoundError where that is no JSON."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise UnsoundError(f"no JSON in what is printed ({error})") from error


def sound(answers: Sequence[Prediction]) -> Sequence[Prediction]:
    """``answers``; UnsoundError where one is not a number."""
    for one in answers:
        if not all(map(math.isfinite, (one.value, *one.outputs))):
            raise UnsoundError(f"an answer that is not finite ({one.value}, {one.outputs[:3]})")
    return answers


def finite(value: float) -> float:
    """``value``; UnsoundError where it is not a number."""
    if not math.isfinite(value):
        raise UnsoundError(f"{value}, which is not finite")
    return value


def answered(shop: Workshop, model: Model, path: Path) -> list[Any]:
    """The answers of ``model`` to a row or two of each task, alone and mixed, and the table of them."""
    encoder = None if model.stands_alone else encoder_of(str(path), model.base, load=shop.load)
    predictor = Predictor(model, encoder, str(path))
    found: list[Any] = []
    for task in model.tasks[:4]:
        found.append(sound(predictor.predict(task.name, [(text,) * len(task.text) for text in TEXTS])))
    if len(model.tasks) > 1:
        requests = [(task.name, (TEXTS[0],) * len(task.text)) for task in model.tasks[:4]]
        found.append(sound(predictor.mixed(requests)))
        found.append(mixed_table(predictor, requests))
    return found


def saved(model: mb.Adapter | mb.Merged | mb.Ensemble, folder: Path) -> Model:
    """``model`` as it is once it was written and read."""
    path = folder / "made.safetensors"
    mb.save(model, path, force=True)
    return mb.load(path)
