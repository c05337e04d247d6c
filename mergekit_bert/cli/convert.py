"""``mbert convert``: adapters from and for PEFT, and plain Hugging Face folders."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = (
    "Example: mbert convert adapters/sst.safetensors --to peft --out peft/sst — and back: mbert convert peft/sst --to "
    "mbert --out again/sst.safetensors"
)


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, or a PEFT adapter folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft (a folder that PEFT loads), mbert (a file), or hf (a whole Hugging Face model for each task).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File or folder to write; several tasks get OUT/<task>/.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="The task of a PEFT folder: a built-in one, or a task's YAML file.",
            show_default="what the folder says, or its name",
        ),
    ] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Convert a model file: LoRA, rsLoRA and DoRA folders of PEFT become adapters, these and low-rank models folders.

    What is written is read back and must give the same outputs. PEFT holds adapters of its own kinds and low-rank
    changes: merge with --rank where a method makes them dense. A PEFT folder of a regression gives values in the
    task's range.
    """
    from mergekit_bert import api
    from mergekit_bert.terminal import say

    for path in api.convert(file, to, out, base=base, task=task, force=force):
        say(f"wrote {path}")
