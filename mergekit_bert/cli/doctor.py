"""``mbert doctor``: invariants of the merge methods on the user's adapters, and how well these are likely to merge."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.cli.spelling import in_flags

EXAMPLE = "Example: mbert doctor adapters/sst.safetensors adapters/sts.safetensors --data DIR --picture doctor.png"

ROWS = 64
"""Default value; the parameter is None so that we know whether the user set it."""


def command(
    files: options.Inputs = None,
    methods: options.Methods = "all",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with <task>/train.tsv, for the numbers that need rows (labels are never read); or 'sample'; "
            "or 'synthetic': generated texts.",
            show_default="none",
        ),
    ] = None,
    texts: options.Texts = None,
    keep: options.Keep = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows per task, from --data or --texts.", min=2, max=options.MOST, show_default=str(ROWS)),
    ] = None,
    every_site: Annotated[
        bool, typer.Option("--every-site", help="Check invariants at every site, not at one of each kind.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also write the matrices as heatmaps, a PNG.", show_default="off")
    ] = None,
    json: options.Json = None,
    force: options.Force = False,
    base: options.ModelBase = None,
    threads: options.Threads = None,
) -> None:
    """Check the invariants of the merge methods on these adapters, and predict how well the adapters will merge.

    The first table lists the invariants; the exit code is 1 if one is violated. The second compares every ordered pair
    of inputs; its columns are explained below it and in docs/merging.md. The verdict needs real rows (--data or
    --texts), but no labels. It is based on the predicted loss: the share of its score that each task would lose in the
    plain sum of all inputs at 0.5 each, as estimated by its own adapter (up to 5 %: gets along; up to 20 %: is
    disturbed; more: strongly affected). A better method loses less.
    """
    from mergekit_bert import api
    from mergekit_bert.errors import CompositionError
    from mergekit_bert.evaluation.doctor import hints, to_json, verdicts
    from mergekit_bert.evaluation.pictures import write_picture
    from mergekit_bert.evaluation.tables import as_text, invariant_table, matrix_legend, pair_table, verdict_table
    from mergekit_bert.files import write_json
    from mergekit_bert.formats.inputs import choose_inputs
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import Output, claimed, written
    from mergekit_bert.terminal import say, say_lines

    set_threads(threads)
    plain = options.read_texts(texts or [])
    if rows is not None and not (data or plain):
        raise CompositionError("--rows", "neither --data nor --texts", "a source of rows", "add one, or drop --rows")
    with claimed(*(Output(path, force) for path in (json, picture) if path is not None)):
        inputs = choose_inputs(files or [], keep or [], api.ADAPTERS, base)
        folder = files[0].parent if files else api.ADAPTERS
        diagnosis = api.doctor(
            inputs,
            data,
            methods=options.read_names(methods),
            rows=rows or ROWS,
            every_site=every_site,
            texts=plain,
            base=base,
            folder=folder,
            progress=True,
        )
        say_lines(as_text(invariant_table(diagnosis.invariants)))
        for name, reason in diagnosis.invariants.left_out.items():
            say(f"left out {name}: {in_flags(reason)}")
        if len(diagnosis.report.names) > 1:
            say_lines("\n" + as_text(pair_table(diagnosis.report)))
            for line in matrix_legend(diagnosis.report):
                say(line)
        if diagnosis.report.capacity is not None:
            say(f"room in the basis: {diagnosis.report.capacity} more adapters of this rank")
        if verdicts(diagnosis.report):
            say_lines("\n" + as_text(verdict_table(diagnosis.report)))
        for hint in hints(diagnosis.report):
            say(f"hint: {in_flags(hint)}")
        if json is not None:
            with written(Output(json, force)) as (part,):
                write_json(part, to_json(diagnosis))
            say(f"wrote {json}")
        if picture is not None:
            with written(Output(picture, force)) as (part,):
                write_picture(diagnosis.plot(), part)
            say(f"wrote {picture}")
        if diagnosis.invariants.violated:
            raise typer.Exit(1)
