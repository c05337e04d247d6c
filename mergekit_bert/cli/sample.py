"""``mbert sample``: the generated corpus as files."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: mbert sample corpus/ && mbert train-adapter --task sts --data corpus"


def command(out: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the generated corpus (the one behind --data sample) as <task>/{train,dev}.tsv."""
    from mergekit_bert.data.source import write_sample
    from mergekit_bert.terminal import say

    for path in write_sample(out):
        say(str(path))
