"""Where the rows of every task come from: those that methods may use, to calibrate on, and of a contest."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bert.composing.calibration import check_enough
from mergekit_bert.composing.composition import Merged
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
    Chosen,
    apart_from_training,
    tell_learned,
    training_split,
)
from mergekit_bert.registry import unknown

Texts = Mapping[str, Any]
"""Rows without labels by task: a plain text file, or rows as a caller holds them."""


def tasks_of(models: Sequence[Merged | MergeInput]) -> dict[str, Task]:
    """The tasks of all ``models`` by name."""
    found = [Task.from_json(part["task"]) for one in models for part in one.parts.values()]
    return {task.name: task for task in found}


def given_rows(
    merge_inputs: Sequence[MergeInput],
    data: Data,
    texts: Texts | None,
    count: int,
    encoder: Callable[[], Encoder],
    show: bool,
) -> MergeContext:
    """The encoder, and at most ``count`` rows of each task without labels, for methods that need them.

    Raises UnknownNameError for ``texts`` of other tasks, DataError for what is wrong with a file of them.
    """
    known, named = tasks_of(merge_inputs), texts or {}
    _check_named(named, known)

    @functools.cache
    def of(name: str) -> Rows:
        return _unlabelled(known[name], data, named, count, encoder)

    for name in named:
        of(name)  # what is wrong with a file is told before any work
    return MergeContext(encoder, of, show=show)


def calibration_rows(
    models: Sequence[Merged | MergeInput],
    data: Data,
    texts: Texts | None,
    steps: Sequence[str],
    count: int,
    encoder: Callable[[], Encoder],
) -> dict[str, dict[str, Chosen]]:
    """At most ``count`` rows of each task to calibrate ``models`` on, by step: ``heads`` needs labels, no ``texts``.

    Raises UnknownNameError for ``texts`` of other tasks, DataError for rows that are missing or too few.
    """
    known, named = tasks_of(models), texts or {}
    _check_named(named, known)

    def of(step: str, task: Task) -> Chosen:
        if step == "heads":
            return _for_head(task, models, data, count)
        return Chosen(_unlabelled(task, data, named, count, encoder))

    return {step: {name: of(step, task) for name, task in known.items()} for step in steps}


@dataclass(frozen=True)
class Sources:
    """Where a contest's rows come from.

    ``tasks`` has those to score on, ``labelled`` those to refit heads on, ``unlabelled`` all that methods may use.
    ``whole``: those to score on are all dev rows, on which single models are scored too.
    """

    tasks: Mapping[str, tuple[Task, Rows]]
    labelled: Mapping[str, Rows]
    unlabelled: Callable[[str], Rows]
    whole: bool

    def given(self, count: int, encoder: Encoder, show: bool) -> MergeContext:
        """At most ``count`` rows of each task for a method that needs some."""
        return MergeContext(
            lambda: encoder, functools.cache(lambda name: at_most(self.unlabelled(name), count)), show=show
        )

    def calibration(self, steps: Sequence[str], count: int) -> dict[str, Mapping[str, Rows]]:
        """The rows of each task to calibrate on, by step: at most ``count`` for ``scales``, ``labelled`` for heads."""
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
    """The rows of a contest scored ``on`` dev or held-out rows, with at most ``heads`` of each task for its head.

    Of ``train`` nothing is learned from that is scored on, and it is read only where something needs it. Raises
    UnknownNameError for another ``on`` or ``texts`` of other tasks, CompositionError for rows to score on that an input
    has learned from or may have, DataError for rows that are missing or too few.
    """
    if on not in (DEV, HELD_OUT):
        raise unknown("`on`", on, [DEV, HELD_OUT])
    known, named = tasks_of(merge_inputs), texts or {}
    _check_named(named, known)
    training = {name: part["training"] for one in merge_inputs for name, part in one.parts.items()}
    dev, scored, rest, labelled = dict[str, Rows](), dict[str, Rows](), dict[str, Rows](), dict[str, Chosen]()
    for name, task in known.items():
        if on == HELD_OUT:
            left, scored[name] = training_split(name, training[name], load_rows(task, "train", data))
            rest[name] = dataclasses.replace(left, labels=None)
        else:
            dev[name] = scored[name] = load_rows(task, "dev", data)
        if heads:  # held-out rows are the best for both, so each gets half at least
            most = len(scored[name]) // 2 if on == HELD_OUT else heads
            labelled[name] = _for_head(task, merge_inputs, data, min(heads, most))
            taken = set(labelled[name].rows.hashes())
            hashes = scored[name].hashes()
            scored[name] = scored[name].take([place for place, one in enumerate(hashes) if one not in taken])
        scored[name] = scored[name].take(range(min(len(scored[name]), limit or len(scored[name]))))
    tell_learned("`calibrate=heads`", labelled)
    for one in merge_inputs:
        refuse_seen(f"input {one.name!r}", one.seen(), scored)

    @functools.cache
    def unlabelled(name: str) -> Rows:
        return rest[name] if name in rest and name not in named else unlabelled_rows(known[name], data, named)

    tasks = {name: (task, scored[name]) for name, task in known.items()}
    whole = on == DEV and all(len(scored[name]) == len(rows) for name, rows in dev.items())
    return Sources(tasks, {name: one.rows for name, one in labelled.items()}, unlabelled, whole)


def _check_named(texts: Texts, tasks: Mapping[str, Task]) -> None:
    for name in texts:
        if name not in tasks:
            raise unknown("task of `texts`", name, list(tasks))


def _unlabelled(task: Task, data: Data, texts: Texts, count: int, encoder: Callable[[], Encoder]) -> Rows:
    """At most ``count`` rows of ``task`` without labels: of its plain text, synthetic, or of ``train``."""
    if is_synthetic(data) and task.name not in texts:
        return synthetic_rows(task, whole_words(encoder().tokenizer), count)
    return at_most(unlabelled_rows(task, data, texts), count)


def _for_head(task: Task, models: Sequence[Merged | MergeInput], data: Data, count: int) -> Chosen:
    """At most ``count`` labelled rows of ``task`` to refit its head on."""
    chosen = apart_from_training(task, models, data, count)
    check_enough(chosen.rows)
    return chosen


def at_most(found: Rows, count: int) -> Rows:
    """At most ``count`` rows of the rows found, the same every time."""
    return found.take(sorted(shuffled(len(found), 0)[:count]))
