"""The progress bar that all long work shows, on standard error."""

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mergekit_bert.terminal import PlainConsole
from mergekit_bert.text import one_line


@runtime_checkable
class Bar(Protocol):
    """A progress bar in use."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show ``done`` of the total, and a note."""


@contextlib.contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Bar]:
    """A progress bar on standard error; nothing where it is not wanted or not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=PlainConsole(stderr=True), disable=not show) as bars:
        task = bars.add_task(one_line(title), total=total, note="")

        def update(done: int, note: str = "") -> None:
            bars.update(task, completed=done)
            if note:
                bars.update(task, note=one_line(note))

        yield update
