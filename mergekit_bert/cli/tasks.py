"""``mbert tasks``: the available tasks."""

from typing import Annotated

import typer

from mergekit_bert.registry import names_in

KINDS = ", ".join(names_in("mergekit_bert.data.kinds", "mbert.kinds"))
EXAMPLE = "Example: mbert tasks — or mbert tasks trec.yml to check a task of your own."


def command(
    task: Annotated[
        str | None, typer.Argument(help=f"Show this task in full, by name or YAML file. Kinds: {KINDS}.")
    ] = None,
) -> None:
    """List the built-in tasks, or show one in full.

    A task of your own is a YAML file with the keys name, kind, text (one or two columns), label, labels or range, and
    metric. Use its path wherever a task name is expected.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mergekit_bert.data.kind import kind_of
    from mergekit_bert.data.task import TASKS, get_task
    from mergekit_bert.terminal import say_json, show

    if task is not None:
        say_json(get_task(task).to_json())
        return
    table = Table("task", "labels", "metric", "chance", "what it is", box=SIMPLE_HEAD)
    for one in TASKS:
        table.add_row(one.name, kind_of(one).summary(one), one.metric, f"{one.chance:.3f}", one.description)
    show(table)
