"""``mbert inspect``: the contents of a model file; only a PEFT folder needs its base model for it."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert inspect adapters/sts.safetensors"


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, a PEFT folder or a model folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    base: options.ModelBase = None,
) -> None:
    """Show the contents of a model file: tasks, labels, base, sites, ranks, norms, training, weights and scores."""
    from mergekit_bert.evaluation.describe import describe, description_tables
    from mergekit_bert.terminal import say_json, show

    description = describe(file, base=base)
    if json:
        say_json(description, sort_keys=True)
    else:
        show(*description_tables(description))
