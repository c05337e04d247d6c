"""``mbert compare``: every method in every space on one's own adapters, in one table."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert compare adapters/sst.safetensors adapters/sts.safetensors --methods ties,tsv,iso_c --data DIR"


def command(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Inputs, as for `mbert merge`.", show_default="all adapters in adapters/"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas, or 'all'.")] = "all",
    spaces: Annotated[str, typer.Option(help="Spaces, separated by commas, or 'all'.")] = "all",
    data: options.Data = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Training rows of each task for methods that need some.", show_default="the method's own number", min=1
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score at most so many dev rows of each task.", show_default="all", min=2)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Compress every merge to this rank.", show_default="exact, all directions")
    ] = None,
    seed: options.Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for finished cells, table.md, table.json and picture.png.")] = Path(
        "comparison"
    ),
    base: options.ModelBase = None,
    threads: options.Threads = None,
) -> None:
    """Merge by every method in every space, score each merge on all tasks' dev rows, and print one sorted table.

    Labels of train are never read, and nothing is chosen on the dev rows: all methods run with their defaults. A
    finished cell is kept in the folder and never computed twice; a run that was killed goes on where it was. The last
    columns say how far a merge is behind the best one (paired bootstrap over rows), what it needed, and what it cost.
    """
    from mergekit_bert import api
    from mergekit_bert.evaluation.tables import as_text, contest_table
    from mergekit_bert.hardware import set_threads

    set_threads(threads)
    contest = api.compare(
        files or sorted(api.ADAPTERS.glob("*.safetensors")),
        methods=None if methods == "all" else [name.strip() for name in methods.split(",")],
        spaces=None if spaces == "all" else [name.strip() for name in spaces.split(",")],
        data=data,
        rows=rows,
        limit=limit,
        rank=rank,
        seed=seed,
        out=out,
        base=base,
        progress=True,
    )
    print(as_text(contest_table(contest.placed, contest.full)), end="")
    for name, reason in contest.refused.items():
        print(f"left out {name}: {reason}")
    print(f"wrote {out / 'table.md'}, {out / 'table.json'} and {out / 'picture.png'}")
