"""``mbert tasks``: what tasks there are."""

from typing import Annotated

import typer

EXAMPLE = "Example: mbert tasks — or mbert tasks trec.yml to check a task of your own."


def command(
    task: Annotated[str | None, typer.Argument(help="One task, by name or YAML file, in full.")] = None,
) -> None:
    """List the built-in tasks, or show one in full.

    A task of your own is a YAML file with the keys name, kind (classify or regress), text (one or two columns), label,
    labels or range, and metric; it is given wherever a task is named.
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
