"""``mbert compare``: every method in every space on the user's adapters, in one table."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.cli.spelling import in_flags

EXAMPLE = "Example: mbert compare adapters/sst.safetensors adapters/sts.safetensors --methods ties,tsv,iso_c --data DIR"


def command(
    files: options.Inputs = None,
    methods: options.Methods = "all",
    spaces: Annotated[str, typer.Option(help="Comma-separated spaces, or 'all'.")] = "all",
    data: options.Data = None,
    texts: options.Texts = None,
    rows: options.Rows = None,
    on: Annotated[
        str,
        typer.Option(
            help="Rows to score on: dev, or held-out (the rows of train that the adapters' training held out; choose a "
            "merge on these)."
        ),
    ] = "dev",
    limit: Annotated[
        int | None,
        typer.Option(help="Score on at most this many rows per task.", show_default="all", min=2, max=options.MOST),
    ] = None,
    rank: options.Rank = None,
    private: options.Private = None,
    calibrate: Annotated[
        str,
        typer.Option(
            help="Add a calibrated version of every merge, as in `mbert merge`: heads, scales, or scales,heads.",
            show_default="off",
        ),
    ] = "",
    calibrate_rows: options.CalibrateRows = None,
    keep: options.Keep = None,
    seed: options.Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for finished results, table.md, table.json and picture.png.")
    ] = Path("comparison"),
    base: options.ModelBase = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a table for other inputs or rows.")] = False,
    threads: options.Threads = None,
) -> None:
    """Merge by every method in every space, score each merge on rows of all tasks, and print one sorted table.

    All methods run with their default options. Merging reads no labels, except for --calibrate heads. If you choose a
    merge by its score here, choose with --on held-out and report scores on dev. Percentages are relative to the
    ensemble of the same adapters (not available for merged files) and to full fine-tuning if that is recorded. Finished
    results are kept in the folder and not computed again: an interrupted run continues, and a later run with other
    methods adds rows to the table. The last columns show how far a merge is behind the best one (paired bootstrap over
    rows), what it needed, and what it cost.
    """
    from mergekit_bert import api
    from mergekit_bert.evaluation.tables import as_text, method_table, missing_references, scored_rows
    from mergekit_bert.formats.inputs import choose_inputs
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import held
    from mergekit_bert.terminal import say, say_lines

    options.refuse_alone({"--calibrate-rows": calibrate_rows}, "--calibrate", calibrate)
    set_threads(threads)
    with held(out):
        comparison = api.compare(
            choose_inputs(files or [], keep or [], api.ADAPTERS, base),
            methods=options.read_names(methods),
            spaces=options.read_names(spaces),
            data=data,
            texts=options.read_texts(texts or []),
            rows=rows,
            limit=limit,
            on=on,
            rank=rank,
            private=private,
            calibrate=[calibrate],
            calibrate_rows=calibrate_rows or options.CALIBRATE_ROWS,
            seed=seed,
            out=out,
            base=base,
            references=files or [],
            force=force,
            progress=True,
        )
        say_lines(as_text(method_table(comparison.merges, comparison.full)))
        say(scored_rows(comparison))
        if missing := missing_references(comparison):
            say(in_flags(missing))
        for name, reason in comparison.refused.items():
            say(f"left out {name}: {in_flags(reason)}")
        say(f"wrote {out / 'table.md'}, {out / 'table.json'} and {out / 'picture.png'}")
