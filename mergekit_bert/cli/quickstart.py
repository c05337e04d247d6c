"""``mbert quickstart``: the whole workflow, on the generated corpus or on real text."""

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
    """Train adapters, linear probes and fully fine-tuned models for sst, para and sts; merge; compare in one table.

    Finished parts are reused, so an interrupted run continues. On the generated corpus training is shortened to take a
    few minutes in total; on real text the defaults of each command apply.
    """
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import held
    from mergekit_bert.quickstart import quickstart

    set_threads(threads)
    with held(out):
        quickstart(data, base, out, TASKS, seed, force)
