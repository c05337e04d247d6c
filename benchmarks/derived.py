"""Two more tasks for merges of many, made from the rows of those that are there: one unlike the others, one like.

``asks``: with which word a question of para began, once it is taken away. ``polar``: sst without its neutral rows,
positive or negative, as in SST-2.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import Task, get_task

_WORDS = ("what", "how", "why")


def _task(name: str, labels: tuple[str, ...]) -> Task:
    return Task(name=name, kind="classify", text=("sentence",), labels=labels, metrics=("accuracy",))


def _asks(text: str, label: float) -> tuple[str, int]:
    first, _, rest = text.strip().partition(" ")
    return rest.strip(), _WORDS.index(first.lower()) if first.lower() in _WORDS else len(_WORDS)


def _polar(text: str, label: float) -> tuple[str, int]:
    return (text if label != 2 else ""), int(label > 2)


_DERIVED: Mapping[str, tuple[Task, str, Callable[[str, float], tuple[str, int]]]] = {
    "asks": (_task("asks", (*_WORDS, "other")), "para", _asks),
    "polar": (_task("polar", ("0", "1")), "sst", _polar),
}
"""The task, the one whose rows it is made from, and what becomes of a row: without a text it is left out."""


def task_of(name: str) -> Task:
    """A derived task, or one of mbert's own."""
    return _DERIVED[name][0] if name in _DERIVED else get_task(name)


def rows_of(name: str, split: str, data: Path) -> Rows:
    """The labelled rows of a task in the folder ``data``, derived ones made from those of their source."""
    if name not in _DERIVED:
        return load_rows(get_task(name), split, data)
    _, source, made_of = _DERIVED[name]
    rows = load_rows(get_task(source), split, data)
    labels = rows.label_column(get_task(source)).tolist()
    made = [made_of(texts[0], label) for texts, label in zip(rows.texts, labels, strict=True)]
    kept = [(text, label) for text, label in made if text]
    return Rows(tuple((text,) for text, _ in kept), tuple(float(label) for _, label in kept), f"{rows.where} ({name})")
