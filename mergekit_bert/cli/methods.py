"""``mbert methods``: the available merge methods."""

from typing import Annotated

import typer

EXAMPLE = "Example: mbert methods ties"


def command(
    name: Annotated[
        str | None, typer.Argument(help="A method to describe in full.", show_default="a table of all")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All methods in full, as Markdown.")] = False,
) -> None:
    """List the merge methods, or describe one: formula, source, requirements, spaces, options and their ranges."""
    from rich.table import Table

    from mergekit_bert.cli.spelling import in_flags
    from mergekit_bert.composing.method import METHODS
    from mergekit_bert.composing.reference import COLUMNS, method_page, method_row
    from mergekit_bert.terminal import say_lines, show

    if name is not None:
        say_lines(f"{method_page(METHODS.get(name), spelled=in_flags)}\n")
        return
    if markdown:
        say_lines("\n".join(method_page(method, spelled=in_flags) for method in METHODS))
        return
    table = Table(*COLUMNS, show_lines=False)
    for method in METHODS:
        table.add_row(*method_row(method))
    show(table)
