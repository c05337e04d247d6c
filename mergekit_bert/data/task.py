"""Tasks: what a text task is, the built-in ones by name, and a user's own from a short YAML file."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import InstanceOf

from mergekit_bert.arguments import check_types, checked
from mergekit_bert.data.kind import KINDS, HubFields, kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.documents import DocumentError, read_yaml
from mergekit_bert.errors import DataError, UnknownNameError
from mergekit_bert.registry import Registry, names_in
from mergekit_bert.strict import STRICT, Before
from mergekit_bert.text import has_control_characters, printable

_LONGEST = 500
"""Characters of a name or label."""
_LONGEST_DESCRIPTION = 10_000
_SEQUENCES = ("text", "metrics", "labels", "label_names", "range", "thresholds")


def _not_in_files(value: Any) -> Any:
    """No model file says where rows are: it could make another machine read anything."""
    if value:
        raise ValueError("where the rows are is no part of a file's task")
    return value


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

    ``labels`` are the label values as they stand in the data, in the order of their indices; ``label_names``
    is how a person reads them. ``range`` bounds a regression's labels (None: unknown); ``thresholds`` are the
    probabilities from which a row has each label, where it may have several. ``metrics`` come with the main one first;
    without any, it is the first of the kind's. ``files`` names the file of a split where it is not
    ``DIR/<name>/<split>.*``. Lists become tuples, and a single name the only one.
    """

    name: str
    kind: str
    text: Sequence[str]
    metrics: Sequence[str] = ()
    label: str = "label"
    labels: Sequence[str] = ()
    label_names: Sequence[str] = ()
    range: Sequence[float] | None = None
    thresholds: Sequence[float] = ()
    description: str = ""
    hub: Annotated[HubSource | None, Before(_not_in_files)] = None
    files: Annotated[tuple[tuple[str, str], ...], Before(_not_in_files)] = ()

    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself with DataError, a field of another type with ArgumentError."""
        for name in _SEQUENCES:
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, name, value)
        check_types(self)

        def check(good: bool, key: str, found: object, expected: str) -> None:
            if not good:
                raise DataError(f"task {self.name!r}", f"{key} is {found!r}", expected, f"correct {key}")

        plain = self.name.replace("-", "_").isidentifier()
        check(plain, "name", self.name, "letters, digits, '-' and '_'")
        check(self.kind in KINDS.names(), "kind", self.kind, f"one of {', '.join(KINDS.names())}")
        kind = kind_of(self)  # whose metrics come with it
        object.__setattr__(self, "metrics", self.metrics or kind.metrics[:1])
        fewest, most = kind.texts
        counted = "one or two" if kind.texts == (1, 2) else f"{fewest} to {most}"
        check(fewest <= len(self.text) <= most, "text", list(self.text), f"{counted} columns")
        check(self.range is None or len(self.range) == 2, "range", self.range, "two numbers, (low, high)")
        columns = (*self.text, self.label)
        apart = len(set(columns)) == len(columns)
        check(apart, "text", list(self.text), f"columns that differ from each other and from the label {self.label!r}")
        once = len(set(self.metrics)) == len(self.metrics) > 0
        check(once, "metric", list(self.metrics), "at least one metric, each once")
        for name in self.metrics:
            check(kind.fits(metric(name)), "metric", name, f"a metric of a task of kind {self.kind!r}")
        short: dict[str, Iterable[str]] = {"name": [self.name], "text": self.text, "label": [self.label]}
        short |= {"labels": self.labels, "label_names": self.label_names}
        for key, texts in short.items():
            for one in texts:
                good = len(one) <= _LONGEST and not has_control_characters(one.replace("\t", " "))
                check(good, key, one, f"up to {_LONGEST} characters, none of them a control character or a line end")
        good = len(self.description) <= _LONGEST_DESCRIPTION and printable(self.description) == self.description
        check(good, "description", self.description, f"up to {_LONGEST_DESCRIPTION} characters, no control characters")
        if (problem := kind.problem(self)) is not None:
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
    def from_json(cls, value: Any) -> "Task":
        """The inverse of :meth:`to_json`; raises SchemaError, DataError or UnknownNameError for anything else."""
        from mergekit_bert.schema import validate

        return validate(cls, value)


TASKS = Registry("mergekit_bert.data.tasks", "task", Task, "mbert.tasks")
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


@checked
def get_task(name: str | Path | InstanceOf[Task]) -> Task:
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


def task_from_hub(name: str, fields: HubFields) -> Task:
    """The task of a foreign model whose configuration has ``fields``: one text a row, called ``text``.

    ``name`` is made a task's name where it is none. Raises DataError where no kind of task has such fields.
    """
    name = re.sub(r"[^\w-]", "_", name)
    name = name if name.replace("-", "_").isidentifier() else f"task_{name}"
    own = names_in(KINDS.package)
    for kind in sorted(KINDS, key=lambda kind: kind.name in own):  # mbert's own take whatever transformers knows
        if (found := kind.from_hub(fields)) is not None:
            return Task(name, kind.name, ("text",), kind.metrics[:1], **found)
    raise DataError(
        f"task {name!r}",
        f"{len(fields.id2label)} outputs, problem_type {fields.problem_type!r}",
        f"outputs of a task of kind {' or '.join(KINDS.names())}",
        "name its task",
    )


def with_source(task: Task, known: Task | None = None) -> Task:
    """A model file's ``task`` with the places of its rows: those of ``known``, or of the built-in task that it is."""
    if known is None and task.name in TASKS.names():
        built_in = TASKS.get(task.name)
        known = built_in if built_in.to_json() == task.to_json() else None
    return task if known is None else dataclasses.replace(task, hub=known.hub, files=known.files)


def read_task(path: Path) -> Task:
    """A user's own task from YAML; raises :class:`~mergekit_bert.errors.DataError`."""
    try:
        found = read_yaml(path)
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file", "a task's YAML file", "check the path") from error
    except OSError as error:
        raise DataError(str(path), (error.strerror or str(error)).lower(), "a task's YAML file", "check it") from error
    except DocumentError as error:
        where = str(path) if error.line is None else f"{path}, line {error.line}"
        raise DataError(
            where, str(error), "a task in plain YAML: a mapping of keys", "see `mbert tasks --help`"
        ) from error
    known = ", ".join(sorted(_YAML_KEYS))
    for key, line in found.lines.items():
        if key not in _YAML_KEYS:
            raise DataError(f"{path}, line {line}", f"unknown key {key!r}", f"keys among {known}", "remove it")
    for key in ("name", "kind", "text"):
        if key not in found.value:
            raise DataError(str(path), f"no key {key!r}", "name, kind and text at least", "add it")
    return _task_from_yaml(path, found.value, found.lines)


def _task_from_yaml(path: Path, value: Mapping[str, Any], lines: Mapping[str, int]) -> Task:
    def wrong(key: str, expected: str) -> DataError:
        return DataError(f"{path}, line {lines[key]}", f"{key} is {value[key]!r}", expected, "correct it")

    def strings(key: str) -> tuple[str, ...]:
        item = value.get(key, [])
        items = item if isinstance(item, list) else [item]
        if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in items):
            raise wrong(key, "text or numbers (quote words like yes and no)")
        return tuple(str(one) for one in items)

    def string(key: str, default: str = "") -> str:
        found = strings(key) if key in value else (default,)
        if len(found) != 1:
            raise wrong(key, "one text")
        return found[0]

    kind = string("kind")
    if kind not in KINDS.names():
        raise wrong("kind", f"one of {', '.join(KINDS.names())}")

    def numbers(key: str, expected: str) -> tuple[float, ...]:
        items = value.get(key) or []
        if not isinstance(items, list) or not all(
            isinstance(one, int | float) and not isinstance(one, bool) for one in items
        ):
            raise wrong(key, expected)
        return tuple(float(one) for one in items)

    for key, expected in KINDS.get(kind).required.items():
        if value.get(key) is None:
            raise DataError(str(path), f"{key} is None", expected, f"add {key}")
    bounds, files = numbers("range", "two numbers, [low, high]"), value.get("files", {})
    if value.get("range") is not None and len(bounds) != 2:
        raise wrong("range", "two numbers, [low, high]")
    named = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not named or not set(files) <= {"train", "dev"}:
        raise wrong("files", "a mapping of train and dev to paths")
    return Task(
        name=string("name"),
        kind=kind,
        text=strings("text"),
        metrics=strings("metric"),
        label=string("label", "label"),
        labels=strings("labels"),
        label_names=strings("label_names"),
        range=(bounds[0], bounds[1]) if bounds else None,
        thresholds=numbers("thresholds", "a probability for each label"),
        description=string("description"),
        files=tuple((split, str(path.parent / file)) for split, file in sorted(files.items())),
    )
