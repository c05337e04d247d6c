"""Cells of the evidence: sets of adapters, merges of some of them, and what these keep of the ensemble on dev rows."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from benchmarks.derived import rows_of, task_of
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.composing.merge_input import MergeInput, of_adapter
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.composing.recipe import ENSEMBLE, Recipe, rows_for
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric, overall_score
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.synthetic import synthetic_rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.words import whole_words
from mergekit_bert.evaluation.comparison import retention
from mergekit_bert.evaluation.held_out import training_split
from mergekit_bert.evaluation.merge_results import MergeResult, run_recipe
from mergekit_bert.evaluation.sources import at_most

RESAMPLES = 1000
CALIBRATED = 256
"""Rows of each task for a calibration, as ``mbert merge`` takes unless told."""
_BESIDE = ("weight", "synthetic", "calibrate")
"""What stands beside the arguments of a recipe."""
Dev = Mapping[str, tuple[Task, Rows]]


@dataclass(frozen=True)
class Result:
    """One cell of the set ``place``, and the figures by task: its own and the ensemble's."""

    place: str
    label: str
    rows: int | None
    cell: MergeResult
    own: Mapping[str, float]
    whole: Mapping[str, float]

    @property
    def overall(self) -> float:
        """The overall score."""
        return _overall(self.own)

    @property
    def percent(self) -> float:
        """Of the ensemble's overall score."""
        return 100 * self.overall / _overall(self.whole)

    @property
    def percents(self) -> dict[str, float]:
        """Of the ensemble's figure, by task, as they are: of those where it is positive."""
        shares = {task: retention(value, self.whole[task]) for task, value in self.own.items()}
        return {task: 100 * share for task, share in shares.items() if share is not None}

    @property
    def worst(self) -> tuple[float, str]:
        """The least of them, and the task."""
        return min((value, task) for task, value in self.percents.items())

    def to_json(self) -> dict[str, Any]:
        """All of it, but for the outputs; of what was learned, numbers and words."""
        learned = {name: value for name, value in self.cell.learned.items() if isinstance(value, int | float | str)}
        return {
            "set": self.place,
            "tasks": list(self.own),
            "merge": self.label,
            "recipe": self.cell.recipe.to_json(),
            "rows": self.rows,
            "scores": dict(self.own),
            "overall": self.overall,
            "percent": {**self.percents, "overall": self.percent, "worst task": self.worst[0]},
            "seconds": round(self.cell.seconds, 3),
            "bytes": self.cell.size,
            "memory_bytes": self.cell.memory,
            "learned": learned,
        }


@dataclass(frozen=True)
class Set:
    """One set of adapters, ``folder/<task>.safetensors``; finished cells lie in ``kept``.

    Merges are scored on ``dev``, and take what they need from rows of ``train``.
    """

    folder: Path
    encoder: Encoder
    dev: Dev
    train: Mapping[str, Rows]
    kept: Path

    @property
    def name(self) -> str:
        """Such as orthogonal_0."""
        return self.folder.name

    @property
    def basis(self) -> str:
        """The name without the seed."""
        return self.name.rsplit("_", 1)[0]

    @cached_property
    def inputs(self) -> dict[str, MergeInput]:
        """By task."""
        return {name: of_adapter(read_adapter(self.folder / f"{name}.safetensors")) for name in self.dev}

    @cached_property
    def whole(self) -> MergeResult:
        """The ensemble of all: what any merge of some of them is compared with."""
        return self.cell(tuple(self.dev), {"method": ENSEMBLE})

    def given(self, rows: int, synthetic: bool = False) -> MergeContext:
        """So many unlabelled rows of each task's train, those that ``mbert merge --data`` takes; or synthetic ones."""
        if synthetic:
            words = whole_words(self.encoder.tokenizer)
            return MergeContext(
                lambda: self.encoder, lambda task: synthetic_rows(task_of(task), words, rows), show=True
            )
        return MergeContext(lambda: self.encoder, lambda task: at_most(self.train[task], rows), show=True)

    def cell(self, names: Sequence[str], told: Mapping[str, Any], rows: int | None = None) -> MergeResult:
        """The merge of ``names`` by ``told``, the arguments of a recipe; ``weight`` stands for one weight for all.

        With ``synthetic`` the rows are not those of train. ``calibrate`` names steps that are taken after the merge.
        """
        recipe = Recipe(**{key: value for key, value in told.items() if key not in _BESIDE})
        if "weight" in told:
            recipe = dataclasses.replace(recipe, weights=dict.fromkeys(names, told["weight"]))
        inputs = [self.inputs[name] for name in names]
        if recipe.method == ENSEMBLE:  # its file would hold the statistics, which no answer needs
            inputs = [of_adapter(dataclasses.replace(one.adapter, statistics={})) for one in inputs if one.adapter]
        dev = {name: self.dev[name] for name in names}
        given = self.given(rows or rows_for(recipe), told.get("synthetic", False))
        calibration = {step: {name: self._rows_of(step, name) for name in names} for step in told.get("calibrate", ())}
        return run_recipe(recipe, inputs, self.encoder, dev, given, self.kept, calibration)[-1]

    def _rows_of(self, step: str, name: str) -> Rows:
        """What a calibration takes of a task, apart from dev: for heads, rows with labels that training held out."""
        rows, scored = self.train[name] if step == "scales" else _split(self, name)[1], self.dev[name][1]
        apart = set(scored.hashes())
        return at_most(rows.take([place for place, one in enumerate(rows.hashes()) if one not in apart]), CALIBRATED)

    def result(self, names: Sequence[str], label: str, told: Mapping[str, Any], rows: int | None = None) -> Result:
        """The cell and its figures: none where it was refused."""
        cell = self.cell(names, told, rows)
        names = [] if cell.refused else names
        own = {name: _value(*self.dev[name], cell.outputs[name]) for name in names}
        whole = {name: _value(*self.dev[name], self.whole.outputs[name]) for name in names}
        return Result(self.name, label, rows, cell, own, whole)


def open_sets(folder: Path, names: Sequence[str], data: Path, kept: Path, limit: int, encoder: Encoder) -> list[Set]:
    """Every set in ``folder`` that has all of ``names``, to be scored on the first ``limit`` dev rows of each."""
    dev = {name: (task_of(name), _first(rows_of(name, "dev", data), limit)) for name in names}
    train = {name: dataclasses.replace(rows_of(name, "train", data), labels=None) for name in names}
    complete = [
        one
        for one in sorted(folder.iterdir())
        if all((one / f"{name}.safetensors").exists() for name in names)
    ]  # fmt: skip
    return [Set(one, encoder, dev, train, kept) for one in complete]


def held_out(one: Set, limit: int) -> Set:
    """``one`` on rows of train alone: scored on those that its training held out, the merges taking the others."""
    dev, rest = dict[str, tuple[Task, Rows]](), dict[str, Rows]()
    for name, (task, _) in one.dev.items():
        left, held = _split(one, name)
        dev[name], rest[name] = (task, _first(held, limit)), dataclasses.replace(left, labels=None)
    return Set(one.folder, one.encoder, dev, rest, one.kept)


def draws(dev: Dev) -> dict[str, Int[np.ndarray, "draws rows"]]:
    """Row numbers of each task, drawn with replacement: the same for every cell."""
    source = np.random.default_rng(0)
    return {name: source.integers(0, len(rows), (RESAMPLES, len(rows))) for name, (_, rows) in dev.items()}


def redrawn(
    dev: Dev, cell: MergeResult, index: Mapping[str, Int[np.ndarray, "draws rows"]]
) -> Float[np.ndarray, "draws"]:
    """The overall score of ``cell`` on each draw of the rows."""
    figures = []
    for name, (task, rows) in dev.items():
        true, predicted = rows.label_column(task), kind_of(task).predicted(task, cell.outputs[name])
        figures.append((task.metric, metric(task.metric).of(true[index[name]], predicted[index[name]])))
    found: np.ndarray = overall_score(figures)
    return found


def interval(percents: Float[np.ndarray, "sets draws"]) -> tuple[float, float]:
    """95 % interval of the mean over sets, each draw of the rows with a draw of the sets."""
    source, (sets, times) = np.random.default_rng(0), percents.shape
    means = [percents[source.integers(0, sets, sets), draw].mean() for draw in range(times)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def _overall(figures: Mapping[str, float]) -> float:
    return overall_score((task_of(task).metric, value) for task, value in figures.items())


def _value(task: Task, rows: Rows, outputs: Float[np.ndarray, "rows out"]) -> float:
    return metric(task.metric).value(rows.label_column(task), kind_of(task).predicted(task, outputs))


def _split(one: Set, name: str) -> tuple[Rows, Rows]:
    """What the training of an adapter learned from, and what it held out, of the rows that benchmarks.adapters gave."""
    rows = load_rows(one.dev[name][0], "train", one.folder.parent / "data")
    return training_split(name, one.inputs[name].parts[name]["training"], rows)


def _first(rows: Rows, count: int) -> Rows:
    return rows.take(range(min(count, len(rows))))
