"""Prediction with any model, for each of its tasks.

Deltas are folded into the weights once per task (shared ones of a merged model once for all tasks), in float32, so a
prediction costs as much as with the bare encoder. Rows are routed by the task that the caller names.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mergekit_bert.data.batches import Tokens, join
from mergekit_bert.data.kind import Prediction, kind_of
from mergekit_bert.data.readers import tsv_text
from mergekit_bert.data.rows import Rows, given_rows, items
from mergekit_bert.data.task import Task
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.forward import embed_rows, forward_rows, scaled
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.ready import Ready
from mergekit_bert.errors import CompositionError, DataError, MbertWarning, ModelFileError
from mergekit_bert.models.composition import Answering, Model, find_task
from mergekit_bert.models.routing import Mixture


class Predictor:
    """Predicts with ``model`` on ``encoder`` (not needed for a model folder). Threads may share a predictor."""

    def __init__(self, model: Model, encoder: Encoder | None = None, where: str = "model") -> None:
        """Check that model and encoder fit; ``where`` is the model's name in messages. Raises ModelFileError."""
        self._answering: Answering = model.answering(encoder, where)
        self.model: Model = self._answering.model
        self.encoder, self.where = encoder, where
        self._tasks = {task.name: task for task in model.tasks}
        self._ready: dict[str, Ready] = {}
        self._mixture: Mixture | None = None
        self._lock = threading.Lock()

    def outputs(
        self, task: str, rows: Rows, tick: Callable[[int], None] = lambda rows: None
    ) -> Float[np.ndarray, "rows out"]:
        """The head's outputs for every row: logits (rows, labels), or values (rows, 1) in the task's units."""
        known = self._task("task", task)
        _check_texts(rows, repeat(known))
        ready = self._prepare(known)
        tokens = _noting(known, ready.tokens(rows), ready.max_length)
        return ready.units(forward_rows(ready.model, tokens, tick=tick))

    def predict(self, task: str, texts: Iterable[str | Iterable[str]]) -> list[Prediction]:
        """Predictions for ``texts``: strings, or pairs of strings for a pair task.

        Raises DataError naming the row for anything else, CompositionError for a task that the model does not have,
        ModelFileError if an output is not finite.
        """
        known = self._task("task", task)
        rows = given_rows("texts", texts)
        return predictions(known, self.outputs(task, rows), self.where) if len(rows) else []

    def embed(self, task: str, texts: Iterable[object]) -> Float[np.ndarray, "texts width"]:
        """A vector for each of ``texts``: the mean of the last hidden states, which is the input of the task's head.

        Raises CompositionError if the head does not encode each text separately or does not use the mean, DataError
        naming the row for anything that is not a text, ModelFileError if a vector is not finite.
        """
        known = self._task("task", task)
        ready, size = self._prepare(known), len(known.text)
        if not ready.model.every_token or ready.model.sequences != size:
            raise CompositionError(
                f"task {known.name!r} of {self.where}",
                "a head that does not use the mean of each text separately",
                "the head matching, cosine or, for one text, mean",
                "train with another `head`, or use `predict`",
            )
        rows = given_rows("texts", texts)
        for number, row in enumerate(rows.texts, start=1):
            if len(row) != 1:
                raise DataError(f"texts, row {number}", f"{len(row)} texts", "one text per row", "give them one by one")
        if not len(rows):
            raise DataError("texts", "no texts", "at least one", "give some")
        single = [text for (text,) in rows.texts]
        single += single[-1:] * (-len(single) % size)
        grouped = Rows(tuple(zip(*(single[place::size] for place in range(size)), strict=True)), None, rows.where)
        vectors = embed_rows(ready.model, _noting(known, ready.tokens(grouped), ready.max_length))[: len(rows)]
        if not np.isfinite(vectors).all():
            raise _not_finite(self.where, known, ~np.isfinite(vectors).all(1))
        return vectors

    def mixed(self, requests: Iterable[tuple[str, str | Iterable[str]]]) -> list[Prediction]:
        """Predictions for requests (task, text or pair of texts) in their order, the rows of all tasks in one batch.

        The frozen encoder processes all rows together and each row uses its own adapter and head, which is faster than
        task by task if every task has few rows. (Architectures that cannot be packed run task by task: DeBERTa passes
        its positions through the adapted layers, so rows of two adapters cannot share them.) Raises what
        :meth:`predict` raises, and CompositionError for a model folder, which has one task.
        """
        encoder = self._answering.encoder
        tasks, rows = self._requests(requests)
        places: dict[str, list[int]] = {}
        for place, task in enumerate(tasks):
            places.setdefault(task.name, []).append(place)
        if packing.enabled(encoder.model):
            outputs = self._mixed_outputs(rows, places)
        else:
            outputs = {name: self.outputs(name, rows.take(indices)) for name, indices in places.items()}
        answers: dict[int, Prediction] = {}
        for name, indices in places.items():
            answers.update(zip(indices, predictions(self._tasks[name], outputs[name], self.where), strict=True))
        return [answers[place] for place in range(len(rows))]

    def _mixed_outputs(self, rows: Rows, places: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """The heads' outputs for the rows of each task (at ``places``), all computed together."""
        if not places:
            return {}
        mixture, encoder, numbers = (
            self._mix(),
            self._answering.encoder,
            {name: number for number, name in enumerate(self._tasks)},
        )
        parts, owners = list[Tokens](), list[int]()
        for name, indices in places.items():
            part = mixture.parts[numbers[name]]
            tokens = part.tokens(encoder, rows.take(indices))
            parts.append(_noting(self._tasks[name], tokens, part.max_length))
            owners += [numbers[name]] * len(indices)
        outputs = iter(mixture.outputs(join(parts), owners))
        return {
            name: scaled(np.stack([next(outputs) for _ in indices]), self._tasks[name])
            for name, indices in places.items()
        }

    def _requests(self, requests: object) -> tuple[list[Task], Rows]:
        """The tasks and the texts of requests; raises DataError naming the row."""
        tasks, texts, expected = list[Task](), list[Any](), "(task, text or pair of texts)"
        for number, request in enumerate(items("requests", requests, f"a list of {expected}"), start=1):
            where = f"requests, row {number}"
            values = items(where, request, expected)
            if len(values) != 2:
                raise DataError(where, f"{len(values)} values", expected, "correct it")
            tasks.append(self._task(where, values[0]))
            texts.append(values[1])
        rows = given_rows("requests", texts)
        _check_texts(rows, tasks)
        return tasks, rows

    def _task(self, where: str, name: object) -> Task:
        """The task called ``name``; raises DataError if it is not a string, CompositionError for an unknown name."""
        if not isinstance(name, str):
            found, names = f"a task of type {type(name).__name__}", ", ".join(self._tasks)
            raise DataError(where, found, f"a task's name, one of {names}", "give its name")
        return self._tasks.get(name) or find_task(self.model, name)

    def _mix(self) -> Mixture:
        """All tasks on one encoder: shared parameters folded into it, task-specific ones applied by row."""
        with self._lock:
            if self._mixture is None:
                self._mixture = Mixture(self._answering.shared, self._answering.own_parts())
            return self._mixture

    def _prepare(self, task: Task) -> Ready:
        with self._lock:
            if task.name not in self._ready:
                self._ready[task.name] = self._answering.ready(task)
            return self._ready[task.name]


def _check_texts(rows: Rows, tasks: Iterable[Task]) -> None:
    """Raise DataError for a row with another number of texts than its task."""
    for number, (texts, task) in enumerate(zip(rows.texts, tasks, strict=False), start=1):
        if len(texts) != len(task.text):
            raise DataError(
                f"{rows.where}, row {number}",
                f"{len(texts)} texts in a row",
                f"{len(task.text)} for {task.name!r}",
                f"give {' and '.join(task.text)}",
            )


def _noting(task: Task, tokens: Tokens, length: int) -> Tokens:
    """``tokens``, with a warning if rows are truncated."""
    if tokens.truncated:
        warnings.warn(
            f"{task.name}: {tokens.truncated} of {len(tokens)} rows are longer than {length} tokens and are truncated",
            MbertWarning,
            stacklevel=3,
        )
    return tokens


def predictions(task: Task, outputs: Float[np.ndarray, "rows out"], where: str = "model") -> list[Prediction]:
    """Outputs as predictions; raises ModelFileError if one is not finite. ``where`` names the model in the message."""
    finite = np.isfinite(outputs).all(1)
    if not finite.all():
        raise _not_finite(where, task, ~finite)
    return kind_of(task).decode(task, outputs)


def _not_finite(where: str, task: Task, rows: Bool[np.ndarray, "rows"]) -> ModelFileError:
    return ModelFileError(
        f"{where}, task {task.name!r}",
        f"outputs that are not finite for {rows.sum()} of {len(rows)} rows",
        "finite numbers",
        "check its tensors with `mbert inspect`, and train or merge it again",
    )


def mixed_table(predictor: Predictor, requests: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A TSV with a row for each (task, texts): task, prediction, and, if it has them, its name and probability."""
    lines: list[list[object]] = [["task", "prediction", "name", "probability"]]
    for (name, _), answer in zip(requests, predictor.mixed(requests), strict=True):
        label_name = answer.name if find_task(predictor.model, name).labels else ""
        probability = "" if answer.probability is None else f"{answer.probability:.4f}"
        lines.append([name, answer.label, label_name, probability])
    return tsv_text(lines)


def the_task(model: Model, name: str | None) -> Task:
    """The task called ``name``, or the only one; raises CompositionError."""
    if name is None and len(model.tasks) == 1:
        return model.tasks[0]
    if name is None:
        names = ", ".join(task.name for task in model.tasks)
        raise CompositionError("`task`", "none, but the model has several", f"one of {names}", "give `task`")
    return find_task(model, name)


def predict_table(predictor: Predictor, task: Task, rows: Rows) -> str:
    """A TSV: the texts, the prediction, and, if the task's kind has them, the label's name and its probability."""
    named, probable = bool(task.labels), kind_of(task).has_probability
    lines = [[*task.text, "prediction", *(["name"] if named else []), *(["probability"] if probable else [])]]
    answers = predictions(task, predictor.outputs(task.name, rows), predictor.where)
    for texts, answer in zip(rows.texts, answers, strict=True):
        more = [*([answer.name] if named else []), *([f"{answer.value:.4f}"] if probable else [])]
        lines.append([*texts, answer.label, *more])
    return tsv_text(lines)
