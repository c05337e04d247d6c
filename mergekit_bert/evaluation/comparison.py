"""Comparison of a model with its references: its adapters, the probe and full fine-tuning, by task and overall."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_bert.data.given import Data
from mergekit_bert.data.metric import overall_score
from mergekit_bert.data.task import TASKS, Task
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.evaluation.records import Record
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.models.composition import Model

REFERENCES = ("adapter", "probe", "full")
_COMMANDS = {
    "adapter": "mbert eval adapters/{name}.safetensors --task {task}",
    "probe": "mbert train-adapter --type probe --task {task}",
    "full": "mbert finetune --task {task}",
}


@dataclass(frozen=True)
class Grid:
    """Scores by the main metrics, tasks × models; None if not measured."""

    tasks: tuple[tuple[str, str], ...]
    models: tuple[str, ...]
    values: Mapping[tuple[str, str], float | None]

    def overall(self, model: str) -> float | None:
        """The overall score (a correlation counts as (r + 1) / 2); None unless every task was measured."""
        scores = [(metric, self.values.get((task, model))) for task, metric in self.tasks]
        if any(value is None for _, value in scores):
            return None
        return overall_score((metric, value) for metric, value in scores if value is not None)


def retention(value: float | None, reference: float | None) -> float | None:
    """``value / reference``; None if either is missing or the reference is not positive.

    Scores of a task are used as shown, correlations too; overall scores are those of :meth:`Grid.overall`.
    """
    return value / reference if value is not None and reference is not None and reference > 0 else None


def in_per_cent(share: float | None) -> float | None:
    """``share`` times 100."""
    return None if share is None else 100 * share


@dataclass(frozen=True)
class Line:
    """One task and metric: the model's score and those of the references (None: not recorded)."""

    score: Score
    references: Mapping[str, float | None]

    def retention(self, reference: str) -> float | None:
        """The score in per cent of a reference's; None if that is missing or not positive."""
        return in_per_cent(retention(self.score.value, self.references.get(reference)))


@dataclass(frozen=True)
class Comparison:
    """A model and its references. ``missing`` lists the commands that record missing reference scores."""

    model: str
    lines: tuple[Line, ...]
    main: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]

    def grid(self) -> Grid:
        """The main metrics as a grid: the model, then its references."""
        values: dict[tuple[str, str], float | None] = {}
        for line in self.lines:
            if (line.score.task, line.score.metric) in self.main:
                values[line.score.task, self.model] = line.score.value
                values |= {(line.score.task, name): line.references[name] for name in REFERENCES}
        return Grid(self.main, (self.model, *REFERENCES), values)

    def to_json(self) -> dict[str, Any]:
        """One entry per task and metric, and the overall scores."""
        grid = self.grid()
        scores = []
        for line in self.lines:
            entry = {key: value for key, value in asdict(line.score).items() if key != "data"}
            for name in REFERENCES:
                entry[name], entry[f"retention_{name}"] = line.references[name], line.retention(name)
            scores.append(entry)
        return {
            "model": self.model,
            "scores": scores,
            "overall": grid.overall(self.model),
            "overall_references": {name: grid.overall(name) for name in REFERENCES},
            "missing": list(self.missing),
        }


def compare(
    model: Model,
    scores: Sequence[Score],
    records: Sequence[Record],
    data: Data = None,
    spelled: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare ``scores`` of ``model`` with those in ``records`` of its adapters, the probe and full fine-tuning.

    ``data`` and ``spelled`` (a task's YAML file by the task's name) are how the caller named the rows. The commands for
    missing scores use the same names.
    """
    lines, missing = [], []
    tasks = {task.name: task for task in model.tasks}
    for score in scores:
        references = {name: _reference(name, model, score, records) for name in REFERENCES}
        lines.append(Line(score, references))
        if score.metric == tasks[score.task].metric:
            missing += [
                command_for(name, score.task, model.base.name, data, spelled)
                for name, value in references.items()
                if value is None
            ]
    main = tuple((task.name, task.metric) for task in tasks.values() if any(s.task == task.name for s in scores))
    return Comparison(model.role(), tuple(lines), main, tuple(missing))


def command_for(role: str, task: str, base: str, data: Data = None, spelled: Mapping[str, str] | None = None) -> str:
    """The command that records the scores of a reference on the dev rows of ``task``; see :func:`compare`."""
    spelling = (spelled or {}).get(task, task if task in TASKS.names() else f"{task}.yml")
    rest = "" if data is None else f" --data {shlex.quote(str(data))}"
    rest += "" if base == MINILM else f" --base {shlex.quote(base)}"
    return _COMMANDS[role].format(name=task, task=shlex.quote(spelling)) + rest


def _reference(role: str, model: Model, score: Score, records: Sequence[Record]) -> float | None:
    if role == model.role():
        return score.value
    wanted = model.sha256_of(score.task) if role == "adapter" else None
    for record in records:
        fits = record.role == role and record.base == model.base.fingerprint
        if fits and (wanted is None or wanted in (record.sha256, record.adapter)):
            for other in record.scores:
                if (other.task, other.metric, other.data) == (score.task, score.metric, score.data):
                    return other.value
    return None


def grid_of(tasks: Sequence[Task], measured: Mapping[str, Sequence[Score]]) -> Grid:
    """A grid of the scores of several models, given by model name."""
    values: dict[tuple[str, str], float | None] = {}
    main = tuple((task.name, task.metric) for task in tasks)
    for model, scores in measured.items():
        values |= {(s.task, model): s.value for s in scores if (s.task, s.metric) in main}
    return Grid(main, tuple(measured), values)
