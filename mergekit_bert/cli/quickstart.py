"""``mbert quickstart``: the main job whole, on the generated corpus or on real text."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert quickstart — or mbert quickstart --data DIR --out real for the same on real text."
TASKS = ("sst", "para", "sts")


def command(
    data: Annotated[
        str, typer.Option(help="'sample' (the generated corpus), or a folder with sst/, para/ and sts/.")
    ] = "sample",
    base: options.Base = "minilm",
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("quickstart"),
    seed: options.Seed = 0,
    threads: options.Threads = None,
    force: options.Force = False,
) -> None:
    """Train adapters, linear probes and full fine-tuning for sst, para and sts; merge; compare in one table.

    Finished parts are reused, and a run that was cut short goes on. On the generated corpus training is shortened so
    that all is done in a few minutes; on real text every command's defaults apply.
    """
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import held
    from mergekit_bert.quickstart import quickstart

    set_threads(threads)
    with held(out):
        quickstart(data, base, out, TASKS, seed, force)
