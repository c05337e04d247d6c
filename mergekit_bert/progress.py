"""The progress bar that all long work shows, on standard error."""

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Bar(Protocol):
    """A progress bar in use."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show ``done`` of the total, and a note."""


@contextlib.contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Bar]:
    """A progress bar on standard error; nothing where it is not wanted or not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task(title, total=total, note="")

        def update(done: int, note: str = "") -> None:
            bars.update(task, completed=done)
            if note:
                bars.update(task, note=note)

        yield update
