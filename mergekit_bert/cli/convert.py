"""``mbert convert``: to and from PEFT folders, and to plain Hugging Face folders."""

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
            help="peft (a folder that PEFT loads), mbert (a file), or hf (a Hugging Face model for each task).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File or folder to write; several tasks get OUT/<task>/.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="The task of a PEFT folder: a built-in task or a YAML file.",
            show_default="the one in the folder, or a task named after it",
        ),
    ] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Convert an mbert file or a PEFT folder to a PEFT folder, mbert file or Hugging Face folders.

    The output is read back and must give the same outputs. PEFT can store its own adapter families and low-rank
    changes; if a merge method makes dense changes, merge with --rank. In a PEFT folder that mbert writes, a regression
    gives values in the task's range.
    """
    from mergekit_bert import api
    from mergekit_bert.terminal import say

    for path in api.convert(file, to, out, base=base, task=task, force=force):
        say(f"wrote {path}")
