"""Prediction: texts in, answers out, by any model file and for each of its tasks.

Deltas are folded into the weights once a task (what all tasks of a merged model share, once in all), in float32, so a
prediction costs what the bare encoder costs. Routing is by the task that the caller names.
"""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.file import check_base, check_part
from mergekit_bert.composing.composition import Merged, Model, find_task
from mergekit_bert.composing.routing import Mixture
from mergekit_bert.data.batches import Tokens, join, tokenise
from mergekit_bert.data.kind import Prediction, kind_of
from mergekit_bert.data.readers import tsv_text
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.folder import FullModel, load_folder
from mergekit_bert.encoder.forward import forward_rows, scaled
from mergekit_bert.encoder.heads import Classifier, classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, DataError, MbertWarning, ModelFileError


@dataclass(frozen=True)
class _Ready:
    model: Classifier
    tokenizer: Any
    max_length: int
    pad_token: int


class Predictor:
    """Answers rows with ``model`` on ``encoder`` (not needed for a model folder). Threads may share one."""

    def __init__(self, model: Model, encoder: Encoder | None = None, where: str = "model") -> None:
        """Check that model and encoder fit; ``where`` is what messages call the model. Raises ModelFileError."""
        self.model, self.encoder, self.where = model, encoder, where
        self._ready: dict[str, _Ready] = {}
        self._shared: Encoder | None = None
        self._mixture: Mixture | None = None
        self._lock = threading.Lock()
        if not isinstance(model, FullModel):
            if encoder is None:
                raise ModelFileError(where, "no encoder", f"the base {model.base.name!r}", "load it with load_encoder")
            check_base(where, model.base, encoder)
            for task in model.tasks:
                check_part(f"{where}, task {task.name!r}", model.part(task.name), encoder)

    def outputs(
        self, task: str, rows: Rows, tick: Callable[[int], None] = lambda rows: None
    ) -> Float[np.ndarray, "rows out"]:
        """What the head gives for every row: logits (rows, labels), or (rows, 1) values in the task's own units."""
        found = find_task(self.model, task)
        ready = self._prepare(found)
        tokens = _tokens(found, rows, ready.tokenizer, ready.max_length, ready.pad_token)
        values = forward_rows(ready.model, tokens, tick=tick)
        return values if isinstance(self.model, FullModel) else scaled(values, found)

    def predict(self, task: str, texts: Sequence[str | Sequence[str]]) -> list[Prediction]:
        """Answers for ``texts``: strings, or pairs of strings for a pair task."""
        if not texts:
            return []
        rows = Rows(tuple((one,) if isinstance(one, str) else tuple(one) for one in texts), None, "texts")
        return predictions(find_task(self.model, task), self.outputs(task, rows))

    def mixed(self, requests: Sequence[tuple[str, str | Sequence[str]]]) -> list[Prediction]:
        """Answers for requests (task, text or pair of texts) in their order, the rows of all tasks together.

        The frozen encoder sees all rows at once and each goes through its own adapter and head: quicker than task by
        task where every task has few rows. (Task by task it is where an architecture cannot be packed: DeBERTa puts
        its positions through the adapted layers, so that rows of two adapters cannot share them.) Raises
        CompositionError for a model folder, which has one task.
        """
        if isinstance(self.model, FullModel):
            raise CompositionError(self.where, "a model folder", "a file of several tasks", "call predict")
        known = {task.name: task for task in self.model.tasks}
        tasks = [known.get(name) or find_task(self.model, name) for name, _ in requests]
        texts = [(text,) if isinstance(text, str) else tuple(text) for _, text in requests]
        answers: list[Any] = [None] * len(requests)
        if not requests:
            return answers
        if not packing.enabled(self._base().model):
            for name in dict.fromkeys(name for name, _ in requests):
                own = [place for place, one in enumerate(tasks) if one.name == name]
                for place, answer in zip(own, self.predict(name, [texts[place] for place in own]), strict=True):
                    answers[place] = answer
            return answers
        mixture, encoder = self._mix(), self._base()
        parts, owners = list[Tokens](), list[int]()
        places: list[int] = []
        numbers = {name: number for number, name in enumerate(known)}
        by_task: dict[str, list[int]] = {}
        for place, task in enumerate(tasks):
            by_task.setdefault(task.name, []).append(place)
        for name, own in by_task.items():
            rows = Rows(tuple(texts[place] for place in own), None, "texts")
            length = mixture.max_lengths[numbers[name]]
            parts.append(_tokens(known[name], rows, encoder.tokenizer, length, encoder.pad_token))
            owners += [numbers[name]] * len(own)
            places += own
        outputs = mixture.outputs(join(parts), owners)
        for place, output in zip(places, outputs, strict=True):
            answers[place] = predictions(tasks[place], scaled(output[None], tasks[place]))[0]
        return answers

    def _base(self) -> Encoder:
        assert self.encoder is not None
        return self.encoder

    def _mix(self) -> Mixture:
        """All parts over one encoder: for a merged model the merged one, with what is each task's own beside it."""
        assert not isinstance(self.model, FullModel)
        with self._lock:
            if self._mixture is None:
                base, parts = self._base(), [self.model.part(task.name) for task in self.model.tasks]
                if isinstance(self.model, Merged):
                    base = self._shared_tree()
                    owns = [self.model.own[part.task.name] for part in parts]
                    parts = [
                        dataclasses.replace(part, deltas=own.deltas, shifts=own.shifts)
                        for part, own in zip(parts, owns, strict=True)
                    ]
                self._mixture = Mixture(base, parts)
            return self._mixture

    def _shared_tree(self) -> Encoder:
        """What all tasks of a merged model share, folded once. The lock is held."""
        assert isinstance(self.model, Merged)
        self._shared = self._shared or fold(self._base(), self.model.deltas, self.model.shifts)
        return self._shared

    def _prepare(self, task: Task) -> _Ready:
        with self._lock:
            if task.name not in self._ready:
                self._ready[task.name] = self._build(task)
            return self._ready[task.name]

    def _build(self, task: Task) -> _Ready:
        if isinstance(self.model, FullModel):
            model, tokenizer = load_folder(self.model)
            return _Ready(model, tokenizer, self.model.max_length, int(tokenizer.pad_token_id or 0))
        encoder, part = self._base(), self.model.part(task.name)
        if isinstance(self.model, Merged):
            own = self.model.own[task.name]
            folded = fold(self._shared_tree(), own.deltas, own.shifts)
        else:
            folded = fold(encoder, part.deltas, part.shifts)
        model = classifier(folded, task, part.head)
        return _Ready(model, encoder.tokenizer, part.max_length, encoder.pad_token)


def _tokens(task: Task, rows: Rows, tokenizer: Any, max_length: int, pad_token: int) -> Tokens:
    """The rows of a task, checked and tokenised; a note tells of rows that are cut."""
    for texts in rows.texts:
        if len(texts) != len(task.text):
            raise DataError(
                rows.where,
                f"{len(texts)} texts in a row",
                f"{len(task.text)} for {task.name!r}",
                f"give {' and '.join(task.text)}",
            )
    tokens = tokenise(dataclasses.replace(rows, labels=None), task, tokenizer, max_length, pad_token)
    if tokens.truncated:
        warnings.warn(
            f"{task.name}: {tokens.truncated} of {len(rows)} rows are longer than {max_length} tokens and are cut",
            MbertWarning,
            stacklevel=3,
        )
    return tokens


def predictions(task: Task, outputs: Float[np.ndarray, "rows out"]) -> list[Prediction]:
    """Outputs as answers."""
    return kind_of(task).decode(task, outputs)


def mixed_table(predictor: Predictor, requests: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A TSV with a row for each (task, texts): task, prediction, label's name and probability (empty for a value)."""
    lines: list[list[object]] = [["task", "prediction", "name", "probability"]]
    for (name, _), answer in zip(requests, predictor.mixed(requests), strict=True):
        classifies = kind_of(find_task(predictor.model, name)).has_probability
        lines.append([name, answer.label, *([answer.name, f"{answer.value:.4f}"] if classifies else ["", ""])])
    return tsv_text(lines)


def the_task(model: Model, name: str | None) -> Task:
    """The task called ``name``, or the only one; raises CompositionError."""
    if name is None and len(model.tasks) == 1:
        return model.tasks[0]
    if name is None:
        names = ", ".join(task.name for task in model.tasks)
        raise CompositionError(
            "mbert predict", "a file of several tasks and no --task", f"one of {names}", "give --task"
        )
    return find_task(model, name)


def predict_table(predictor: Predictor, task: Task, rows: Rows) -> str:
    """A TSV: the texts, the predicted label, its name, and its probability (of a regression: prediction alone)."""
    more = ["name", "probability"] if kind_of(task).has_probability else []
    lines = [[*task.text, "prediction", *more]]
    for texts, answer in zip(rows.texts, predictions(task, predictor.outputs(task.name, rows)), strict=True):
        lines.append([*texts, answer.label, *([answer.name, f"{answer.value:.4f}"] if more else [])])
    return tsv_text(lines)
