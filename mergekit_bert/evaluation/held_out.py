"""Held-out rows: rows of a train split whose labels may be used after training, for a search, calibration or scoring.

Rows that the adapter's training held out are preferred, because scores on rows that it was trained on are too high.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.data.given import Data
from mergekit_bert.data.rows import Rows, held_places, hold_out, shuffled
from mergekit_bert.data.source import has_rows, load_rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import CompositionError, DataError, MbertWarning
from mergekit_bert.models.composition import Merged

DEV, HELD_OUT = "dev", "held-out"
"""Rows to score a comparison on: the dev split, or the rows of train that the adapters' training held out."""
_SPLIT = ("hold_out", "hold_out_limit", "seed")
"""Keys of a training record that determine its split: the arguments of :func:`~mergekit_bert.data.rows.hold_out`."""


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a train split, and how many of them the adapter's training held out (None: not recorded)."""

    rows: Rows
    held_out: int | None = None


def apart_from_training(
    task: Task, models: Sequence[Merged | MergeInput], data: Data, count: int, share: float = 1.0
) -> ChosenRows:
    """At most ``count`` labelled rows of ``train``, and at most ``share`` of it; held out in training if possible.

    They exclude dev rows and rows whose labels the models have seen after training. Raises DataError if none is left.
    """
    train = load_rows(task, "train", data)
    excluded = set[str]()
    if has_rows(task, "dev", data):
        excluded.update(load_rows(task, "dev", data, labelled=False).hashes())
    training: Mapping[str, Any] = {}
    for model in models:
        training = model.parts[task.name].get("training", {}) if task.name in model.parts else training
        for _, name, _, hashes in model.seen():
            excluded.update(hashes if name == task.name else ())
    return held_out(train, min(count, int(share * len(train))), training, excluded)


def held_out(train: Rows, count: int, training: Mapping[str, Any], excluded: Collection[str] = ()) -> ChosenRows:
    """At most ``count`` rows of ``train`` whose labels may be used after training; deterministic.

    Rows that the adapter's training held out, according to its record ``training``, come first, then others. Rows whose
    hash is in ``excluded`` are left out: rows to score on, or used by another step. Raises DataError if none is left.
    """
    held, hashes = _held_in_training(train, training), train.hashes()
    free = [place for place in shuffled(len(train), 0) if hashes[place] not in excluded]
    chosen = sorted(free, key=lambda place: place not in (held or ()))[:count]
    if not chosen:
        raise DataError(
            train.where,
            f"{len(train)} rows, all of them scored on or used by another step",
            "other rows than those",
            "give more rows, or a train split without the dev rows",
        )
    held_count = None if held is None else len(held.intersection(chosen))
    return ChosenRows(train.take(sorted(chosen)), held_count)


def _held_in_training(train: Rows, training: Mapping[str, Any]) -> set[int] | None:
    """Positions of the rows that training held out; None if it used other rows or they are not recorded."""
    split: list[Any] = [training.get(key) for key in _SPLIT]
    if None in split or training.get("data") != train.fingerprint():
        return None
    return set(held_places(len(train), *split))


def warn_of_training_rows(step: str, chosen: Mapping[str, ChosenRows]) -> None:
    """Warn of rows that an adapter may have been trained on, on which its features are better than on new rows."""
    for name, selection in chosen.items():
        count = len(selection.rows)
        if selection.held_out is None:
            problem = f"no record of whether the training of its adapter held out the {count} rows of {name}"
        else:
            problem = f"the training of its adapter held out only {selection.held_out} of the {count} rows of {name}"
        if selection.held_out != count:
            warnings.warn(
                f"{step}: {problem}; scores on rows that it was trained on are too high", MbertWarning, stacklevel=3
            )


def training_split(task: str, training: Mapping[str, Any], train: Rows) -> tuple[Rows, Rows]:
    """``train`` split into (rows trained on, rows held out), according to the training record of an input.

    Raises CompositionError if the record is missing or of other rows, because the split is then unknown.
    """
    if not {*_SPLIT, "data"} <= set(training):
        raise CompositionError(
            f"`on={HELD_OUT}`, task {task!r}",
            "an input without a record of which rows its training held out",
            "adapters trained by mbert",
            f"leave the input out, or score on {DEV}",
        )
    if training["data"] != train.fingerprint():
        raise CompositionError(
            f"`on={HELD_OUT}`, task {task!r}",
            f"rows in {train.where} other than those it was trained on",
            "the train split of its training",
            f"give the rows of its training as `data`, or score on {DEV}",
        )
    return hold_out(train, *(training[key] for key in _SPLIT))
