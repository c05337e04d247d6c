"""The rows of every task: for methods that learn from some, for calibration, and for scoring a comparison."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bert.composing.calibration import check_enough
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows, shuffled
from mergekit_bert.data.source import is_synthetic, load_rows, unlabelled_rows
from mergekit_bert.data.synthetic import synthetic_rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.words import whole_words
from mergekit_bert.evaluation.evaluate import refuse_seen
from mergekit_bert.evaluation.held_out import (
    DEV,
    HELD_OUT,
    ChosenRows,
    apart_from_training,
    training_split,
    warn_of_training_rows,
)
from mergekit_bert.models.composition import Merged
from mergekit_bert.registry import unknown

Texts = Mapping[str, Any]
"""Unlabelled rows by task: a plain text file, or rows in any form that a caller may pass."""


def tasks_of(models: Sequence[Merged | MergeInput]) -> dict[str, Task]:
    """The tasks of all ``models`` by name."""
    tasks = [Task.from_json(part["task"]) for model in models for part in model.parts.values()]
    return {task.name: task for task in tasks}


def given_rows(
    merge_inputs: Sequence[MergeInput],
    data: Data,
    texts: Texts | None,
    count: int,
    encoder: Callable[[], Encoder],
    show: bool,
) -> MergeContext:
    """The encoder, and at most ``count`` unlabelled rows of each task, for methods that need them.

    Raises UnknownNameError for ``texts`` of unknown tasks, DataError for errors in a text file.
    """
    tasks, texts = tasks_of(merge_inputs), texts or {}
    _check_names(texts, tasks)

    @functools.cache
    def rows_of(name: str) -> Rows:
        return _unlabelled(tasks[name], data, texts, count, encoder)

    for name in texts:
        rows_of(name)  # errors in a file are reported before any work
    return MergeContext(encoder, rows_of, show=show)


def calibration_rows(
    models: Sequence[Merged | MergeInput],
    data: Data,
    texts: Texts | None,
    steps: Sequence[str],
    count: int,
    encoder: Callable[[], Encoder],
) -> dict[str, dict[str, ChosenRows]]:
    """At most ``count`` rows of each task to calibrate ``models`` on, by step; ``heads`` needs labels, so no ``texts``.

    Raises UnknownNameError for ``texts`` of unknown tasks, DataError for rows that are missing or too few.
    """
    tasks, texts = tasks_of(models), texts or {}
    _check_names(texts, tasks)

    def rows_of(step: str, task: Task) -> ChosenRows:
        if step == "heads":
            return _for_head(task, models, data, count)
        return ChosenRows(_unlabelled(task, data, texts, count, encoder))

    return {step: {name: rows_of(step, task) for name, task in tasks.items()} for step in steps}


@dataclass(frozen=True)
class Sources:
    """The rows of a comparison.

    ``tasks`` has the rows to score on, ``labelled`` those to refit heads on, ``unlabelled`` all rows that methods may
    use. ``on`` says which rows are scored, and ``whole`` whether they are all dev rows, as when a single model is
    evaluated.
    """

    tasks: Mapping[str, tuple[Task, Rows]]
    labelled: Mapping[str, Rows]
    unlabelled: Callable[[str], Rows]
    on: str
    whole: bool

    def context(self, count: int, encoder: Encoder, show: bool) -> MergeContext:
        """At most ``count`` unlabelled rows of each task, for a method that needs some."""
        return MergeContext(
            lambda: encoder, functools.cache(lambda name: at_most(self.unlabelled(name), count)), show=show
        )

    def calibration(self, steps: Sequence[str], count: int) -> dict[str, Mapping[str, Rows]]:
        """The rows to calibrate on, by step and task: at most ``count`` for ``scales``, ``labelled`` for ``heads``."""
        scaling = {name: at_most(self.unlabelled(name), count) for name in self.tasks if "scales" in steps}
        return {step: {"scales": scaling, "heads": self.labelled}[step] for step in steps}


def find_sources(
    merge_inputs: Sequence[MergeInput],
    data: Data,
    texts: Texts | None,
    on: str,
    limit: int | None,
    heads: int,
) -> Sources:
    """The rows of a comparison scored ``on`` dev or held-out rows; at most ``heads`` rows of each task for its head.

    Rows of ``train`` that are scored on are never used for learning, and ``train`` is read only if needed. Raises
    UnknownNameError for another ``on`` or ``texts`` of unknown tasks, CompositionError for rows to score on that an
    input was or may have been trained on, DataError for rows that are missing or too few.
    """
    if on not in (DEV, HELD_OUT):
        raise unknown("`on`", on, [DEV, HELD_OUT])
    tasks, texts = tasks_of(merge_inputs), texts or {}
    _check_names(texts, tasks)
    training = {name: part["training"] for merge_input in merge_inputs for name, part in merge_input.parts.items()}
    dev, scored, rest, labelled = dict[str, Rows](), dict[str, Rows](), dict[str, Rows](), dict[str, ChosenRows]()
    for name, task in tasks.items():
        if on == HELD_OUT:
            trained, scored[name] = training_split(name, training[name], load_rows(task, "train", data))
            rest[name] = dataclasses.replace(trained, labels=None)
        else:
            dev[name] = scored[name] = load_rows(task, "dev", data)
        if heads:  # held-out rows are the best for both heads and scores, so each gets at least half
            most = len(scored[name]) // 2 if on == HELD_OUT else heads
            labelled[name] = _for_head(task, merge_inputs, data, min(heads, most))
            taken = set(labelled[name].rows.hashes())
            hashes = scored[name].hashes()
            scored[name] = scored[name].take([place for place, row in enumerate(hashes) if row not in taken])
        scored[name] = scored[name].take(range(min(len(scored[name]), limit or len(scored[name]))))
    warn_of_training_rows("`calibrate=heads`", labelled)
    for merge_input in merge_inputs:
        refuse_seen(f"input {merge_input.name!r}", merge_input.seen(), scored)

    @functools.cache
    def unlabelled(name: str) -> Rows:
        return rest[name] if name in rest and name not in texts else unlabelled_rows(tasks[name], data, texts)

    whole = on == DEV and all(len(scored[name]) == len(rows) for name, rows in dev.items())
    return Sources(
        {name: (task, scored[name]) for name, task in tasks.items()},
        {name: selection.rows for name, selection in labelled.items()},
        unlabelled,
        on,
        whole,
    )


def _check_names(texts: Texts, tasks: Mapping[str, Task]) -> None:
    for name in texts:
        if name not in tasks:
            raise unknown("task of `texts`", name, list(tasks))


def _unlabelled(task: Task, data: Data, texts: Texts, count: int, encoder: Callable[[], Encoder]) -> Rows:
    """At most ``count`` rows of ``task`` without labels: from its plain texts, synthetic ones, or from ``train``."""
    if is_synthetic(data) and task.name not in texts:
        return synthetic_rows(task, whole_words(encoder().tokenizer), count)
    return at_most(unlabelled_rows(task, data, texts), count)


def _for_head(task: Task, models: Sequence[Merged | MergeInput], data: Data, count: int) -> ChosenRows:
    """At most ``count`` labelled rows of ``task`` to refit its head on."""
    chosen = apart_from_training(task, models, data, count)
    check_enough(chosen.rows)
    return chosen


def at_most(rows: Rows, count: int) -> Rows:
    """At most ``count`` of ``rows``, drawn with a fixed seed."""
    return rows.take(sorted(shuffled(len(rows), 0)[:count]))
