"""``mbert doctor``: whether the merge methods keep their promises on one's own adapters, and how these get along."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert doctor adapters/sst.safetensors adapters/sts.safetensors --data DIR --picture doctor.png"

ROWS = 32
"""What holds where nothing is given; None as the default tells whether something was."""


def command(
    files: options.Inputs = None,
    methods: options.Methods = "all",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder that holds <task>/train.tsv, for what only rows tell (labels are never read), or 'sample'; "
            "'invented': texts that mbert makes up.",
            show_default="none",
        ),
    ] = None,
    texts: options.Texts = None,
    keep: options.Keep = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows of each task, of --data or --texts.", min=2, show_default=str(ROWS))
    ] = None,
    every_site: Annotated[
        bool, typer.Option("--every-site", help="Try the merges at every site, not at one of each kind.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also write the matrices as heatmaps, a PNG.", show_default="not")
    ] = None,
    json: options.Json = None,
    force: options.Force = False,
    base: options.ModelBase = None,
    threads: options.Threads = None,
) -> None:
    """Try the promises of every merge method on these adapters, and tell before any merge how they will get along.

    Exit code 1 if a promise is broken. A verdict rests on one number, which heads its table: with --data or --texts
    on the answers, how far another adapter moves the outputs of a task's head on its rows, in units of their
    variance, the mean over the others (up to 0.2 gets along, beyond is disturbed): of all the numbers it goes best
    with what a merge then loses. Without rows it rests on the overlap, the largest product of the overlaps of input
    and output spaces with another (up to 0.1 apart, up to 0.3 in part in the same place, beyond in the same place),
    which does not tell how far one disturbs another's task.
    """
    from mergekit_bert import api
    from mergekit_bert.composing.inputs import choose_inputs
    from mergekit_bert.errors import CompositionError
    from mergekit_bert.evaluation.doctor import hints, to_json
    from mergekit_bert.evaluation.pictures import doctor_picture
    from mergekit_bert.evaluation.tables import as_text, matrix_legend, pair_table, promise_table, verdict_table
    from mergekit_bert.files import refuse_existing, write_json
    from mergekit_bert.hardware import set_threads

    set_threads(threads)
    plain = options.read_texts(texts or [])
    if rows is not None and not (data or plain):
        raise CompositionError("--rows", "neither --data nor --texts", "rows to take so many of", "add one, or drop it")
    for path in filter(None, (json, picture)):
        refuse_existing(path, force)
    inputs = choose_inputs(files or [], keep or [], api.ADAPTERS, base)
    folder = files[0].parent if files else api.ADAPTERS
    found = api.doctor(
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
    print(as_text(promise_table(found.promises)), end="")
    for name, reason in found.promises.left_out.items():
        print(f"left out {name}: {reason}")
    if len(found.report.names) > 1:
        print("\n" + as_text(pair_table(found.report)) + "\n".join(matrix_legend(found.report)))
    if found.report.capacity is not None:
        print(f"room in the basis: {found.report.capacity} more adapters of this rank")
    print("\n" + as_text(verdict_table(found.report)), end="")
    for hint in hints(found.report):
        print(f"hint: {hint}")
    if json is not None:
        write_json(json, to_json(found))
        print(f"wrote {json}")
    if picture is not None:
        doctor_picture(found.report, picture)
        print(f"wrote {picture}")
    if found.promises.broken:
        raise typer.Exit(1)
