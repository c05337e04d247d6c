"""``mbert inspect``: everything about a model file at a glance, without its base model."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: mbert inspect adapters/sts.safetensors"


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, or a model folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a model file is: tasks and labels, base, sites and ranks, norms, training, weights, recorded scores."""
    import json as encoder

    from rich.console import Console

    from mergekit_bert.evaluation.describe import describe, description_tables

    told = describe(file)
    if json:
        print(encoder.dumps(told, indent=2, sort_keys=True))
        return
    console = Console()
    for table in description_tables(told):
        console.print(table)
