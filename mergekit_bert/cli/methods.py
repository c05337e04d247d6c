"""``mbert methods``: how adapters can be merged."""

from typing import Annotated

import typer

EXAMPLE = "Example: mbert methods ties"


def command(
    name: Annotated[str | None, typer.Argument(help="A method to show in full.", show_default="a table of all")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All methods in full, as Markdown.")] = False,
) -> None:
    """List the merge methods, or show one: formula, source, what it needs, spaces, options and their ranges."""
    from rich.console import Console
    from rich.table import Table

    from mergekit_bert.composing.method import METHODS
    from mergekit_bert.composing.reference import COLUMNS, method_page, method_row

    if name is not None:
        print(method_page(METHODS.get(name)))
        return
    if markdown:
        print("\n".join(method_page(method) for method in METHODS), end="")
        return
    table = Table(*COLUMNS, show_lines=False)
    for method in METHODS:
        table.add_row(*method_row(method))
    Console().print(table)
