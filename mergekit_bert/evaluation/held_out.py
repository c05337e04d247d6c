"""Held-out rows: those of a train split whose labels a step after training may read, or be scored on.

They are best those that the training of an adapter held out, since it answers rows that it learned too well.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bert.composing.composition import Merged
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows, held_places, hold_out, shuffled
from mergekit_bert.data.source import has_rows, load_rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import CompositionError, DataError, MbertWarning

DEV, HELD_OUT = "dev", "held-out"
"""The rows that a contest is scored on: the dev split, or what the adapters' training held out of train."""
_SPLIT = ("hold_out", "hold_out_limit", "seed")
"""What the record of a training tells of its split, as :func:`~mergekit_bert.data.rows.hold_out` takes it."""


@dataclass(frozen=True)
class Chosen:
    """Rows of a train split, and how many of them the adapter's training held out (None: nothing tells)."""

    rows: Rows
    held_out: int | None = None


def apart_from_training(
    task: Task, models: Sequence[Merged | MergeInput], data: Data, count: int, share: float = 1.0
) -> Chosen:
    """At most ``count`` labelled rows, and at most ``share``, of ``train``: held out in training, where it can be.

    They are apart from the dev rows, and from those whose labels the models have seen since. Raises DataError where
    none is left.
    """
    train = load_rows(task, "train", data)
    apart = set[str]()
    if has_rows(task, "dev", data):
        apart.update(load_rows(task, "dev", data, labelled=False).hashes())
    training: Mapping[str, Any] = {}
    for one in models:
        training = one.parts[task.name].get("training", {}) if task.name in one.parts else training
        for _, name, _, hashes in one.seen():
            apart.update(hashes if name == task.name else ())
    return held_out(train, min(count, int(share * len(train))), training, apart)


def held_out(train: Rows, count: int, training: Mapping[str, Any], apart: Collection[str] = ()) -> Chosen:
    """At most ``count`` rows of ``train`` whose labels a step after training may read, the same every time.

    First those that the adapter's training held out, which its record ``training`` tells, then others. None whose
    texts' hash is in ``apart``: rows to score on, or to be read by another step. Raises DataError where none is left.
    """
    held, hashes = _held_in_training(train, training), train.hashes()
    free = [place for place in shuffled(len(train), 0) if hashes[place] not in apart]
    chosen = sorted(free, key=lambda place: place not in (held or ()))[:count]
    if not chosen:
        raise DataError(
            train.where,
            f"{len(train)} rows, none apart from those to score on or read by another step",
            "rows apart from those",
            "give more rows, or a train split apart from the dev split",
        )
    known = None if held is None else len(held.intersection(chosen))
    return Chosen(train.take(sorted(chosen)), known)


def _held_in_training(train: Rows, training: Mapping[str, Any]) -> set[int] | None:
    """The places of the rows that training held out; None where it was on other rows, or no record tells."""
    told: list[Any] = [training.get(key) for key in _SPLIT]
    if None in told or training.get("data") != train.fingerprint():
        return None
    return set(held_places(len(train), *told))


def tell_learned(step: str, chosen: Mapping[str, Chosen]) -> None:
    """Warn of rows that an adapter may have learned: its features are better on them than on fresh ones."""
    for name, one in chosen.items():
        count = len(one.rows)
        if one.held_out is None:
            found = f"nothing tells whether the training of its adapter held out the {count} rows of {name}"
        else:
            found = f"the training of its adapter held out {one.held_out} of the {count} rows of {name} alone"
        if one.held_out != count:
            warnings.warn(f"{step}: {found}; figures on what it learned are too good", MbertWarning, stacklevel=3)


def training_split(task: str, training: Mapping[str, Any], train: Rows) -> tuple[Rows, Rows]:
    """(the rest, the rows held out) of ``train``, by the training that the record of an input tells of.

    Raises CompositionError where it does not tell, or tells of other rows: which were trained on is then unknown.
    """
    if not {*_SPLIT, "data"} <= set(training):
        raise CompositionError(
            f"`on={HELD_OUT}`, task {task!r}",
            "an input that does not tell which rows its training held out",
            "adapters trained by mbert",
            f"leave it out, or score on {DEV}",
        )
    if training["data"] != train.fingerprint():
        raise CompositionError(
            f"`on={HELD_OUT}`, task {task!r}",
            f"rows in {train.where} that are not those it was trained on",
            "the train split of its training",
            f"give that as `data`, or score on {DEV}",
        )
    return hold_out(train, *(training[key] for key in _SPLIT))
