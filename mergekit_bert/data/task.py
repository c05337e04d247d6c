"""Tasks: what a text task is, the built-in ones by name, and a user's own from a short YAML file."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_bert.data.kind import KINDS, kind_of
from mergekit_bert.data.metrics import metric
from mergekit_bert.errors import DataError, UnknownNameError
from mergekit_bert.registry import Registry


@dataclass(frozen=True)
class HubSource:
    """Where the Hugging Face Hub keeps a task: repository, configuration, its columns and splits."""

    path: str
    config: str | None
    columns: dict[str, str]
    splits: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One text task.

    ``labels`` are the label values as they stand in the data, in the order of the head's outputs; ``label_names``
    is how a person reads them. ``range`` bounds a regression's labels; ``thresholds`` are the
    probabilities from which a row has each label, where it may have several. ``metrics`` come with the main one first.
    ``files`` names the file of a split where it is not ``DIR/<name>/<split>.*``.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    metrics: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    thresholds: tuple[float, ...] = ()
    description: str = ""
    hub: HubSource | None = None
    files: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself, with :class:`~mergekit_bert.errors.DataError`."""

        def check(good: bool, key: str, found: object, expected: str) -> None:
            if not good:
                raise DataError(f"task {self.name!r}", f"{key} is {found!r}", expected, f"correct {key}")

        plain = self.name.replace("-", "_").isidentifier()
        check(plain, "name", self.name, "letters, digits, '-' and '_'")
        check(self.kind in KINDS.names(), "kind", self.kind, f"one of {', '.join(KINDS.names())}")
        check(len(self.text) in (1, 2), "text", list(self.text), "one or two columns")
        columns = (*self.text, self.label)
        apart = len(set(columns)) == len(columns)
        check(apart, "text", list(self.text), f"columns that differ from each other and from the label {self.label!r}")
        check(len(self.metrics) > 0, "metric", list(self.metrics), "at least one metric")
        for name in self.metrics:
            fits = self.kind in metric(name).kinds
            check(fits, "metric", name, f"a metric of a task of kind {self.kind!r}")
        if (problem := kind_of(self).problem(self)) is not None:
            check(False, *problem)

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for a row."""
        return kind_of(self).outputs(self)

    @property
    def metric(self) -> str:
        """The main metric's name."""
        return self.metrics[0]

    @property
    def chance(self) -> float:
        """What guessing scores on the main metric: 0 for a correlation."""
        return kind_of(self).chance(self) if not metric(self.metric).correlation else 0.0

    def display(self, index: int) -> str:
        """The name a person reads for label ``index``."""
        return (self.label_names or self.labels)[index]

    def to_json(self) -> dict[str, Any]:
        """What a model file keeps of the task (where the rows came from is not part of it)."""
        kept = dataclasses.asdict(dataclasses.replace(self, hub=None, files=()))
        if not self.thresholds:  # a task without them is what it was before there were any
            del kept["thresholds"]
        return {key: value for key, value in kept.items() if key not in ("hub", "files")}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Task":
        """The inverse of :meth:`to_json`; raises TypeError or DataError for anything else."""
        tuples: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**tuples)


TASKS = Registry("mergekit_bert.data.tasks", "task", Task)
YAML = (".yml", ".yaml")

_YAML_KEYS = {
    "name",
    "kind",
    "text",
    "label",
    "labels",
    "label_names",
    "range",
    "thresholds",
    "metric",
    "files",
    "description",
}


def get_task(name: str | Path | Task) -> Task:
    """A task by its built-in name or from a YAML file; a Task comes back as it is."""
    if isinstance(name, Task):
        return name
    path = Path(name)
    if path.suffix in YAML:
        return read_task(path)
    try:
        return TASKS.get(str(name))
    except UnknownNameError as error:
        raise UnknownNameError("task", error.found, f"{error.expected}, or a .yml file", error.remedy) from error


def with_source(task: Task, known: Task | None = None) -> Task:
    """A model file's ``task`` with the places of its rows: those of ``known``, or of the built-in task that it is."""
    if known is None and task.name in TASKS.names():
        built_in = TASKS.get(task.name)
        known = built_in if built_in.to_json() == task.to_json() else None
    return task if known is None else dataclasses.replace(task, hub=known.hub, files=known.files)


def read_task(path: Path) -> Task:
    """A user's own task from YAML; raises :class:`~mergekit_bert.errors.DataError`."""
    where = str(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(where, "no such file", "a task's YAML file", "check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise DataError(where, f"not readable as YAML ({found})", "a YAML mapping", "correct the file") from error
    if not isinstance(value, dict):
        raise DataError(where, f"a {type(value).__name__}", "a mapping of keys", "see `mbert tasks --help`")
    for key in value:
        if key not in _YAML_KEYS:
            raise DataError(where, f"unknown key {key!r}", f"keys among {', '.join(sorted(_YAML_KEYS))}", "remove it")
    for key in ("name", "kind", "text", "metric"):
        if key not in value:
            raise DataError(where, f"no key {key!r}", "name, kind, text and metric at least", "add it")
    return _task_from_yaml(where, path.parent, value)


def _task_from_yaml(where: str, folder: Path, value: dict[str, Any]) -> Task:
    def strings(key: str) -> tuple[str, ...]:
        item = value.get(key, [])
        items = item if isinstance(item, list) else [item]
        if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in items):
            raise DataError(where, f"{key} is {item!r}", "text or numbers (quote words like yes and no)", "correct it")
        return tuple(str(one) for one in items)

    def string(key: str, default: str = "") -> str:
        found = strings(key) if key in value else (default,)
        if len(found) != 1:
            raise DataError(where, f"{key} is {value[key]!r}", "one text", "correct it")
        return found[0]

    kind = string("kind")
    bounds, files = value.get("range"), value.get("files", {})
    if bounds is not None:
        numbers = isinstance(bounds, list) and len(bounds) == 2
        if not numbers or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in bounds):
            raise DataError(where, f"range is {bounds!r}", "two numbers, [low, high]", "correct it")
        bounds = (float(bounds[0]), float(bounds[1]))
    named = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not named or not set(files) <= {"train", "dev"}:
        raise DataError(where, f"files is {files!r}", "a mapping of train and dev to paths", "correct it")
    return Task(
        name=string("name"),
        kind=kind,
        text=strings("text"),
        metrics=strings("metric"),
        label=string("label", "label"),
        labels=strings("labels"),
        label_names=strings("label_names"),
        range=bounds,
        description=string("description"),
        files=tuple((split, str(folder / file)) for split, file in sorted(files.items())),
    )
