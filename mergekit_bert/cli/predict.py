"""``mbert predict``: answers for texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = 'Example: mbert predict merged.safetensors --task sts "A cat sleeps." "A kitten naps."'


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, or a model folder.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="One row: a text, or two for a pair task.", show_default="none")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which of the file's tasks.", show_default="the only one")] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="File with the task's text columns (.tsv, .csv, .jsonl, .parquet).",
            show_default="a TSV on standard input",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="TSV to write.", show_default="standard output")] = None,
    base: options.ModelBase = None,
    force: options.Force = False,
) -> None:
    """Predict with any model file: a TSV of the texts, the label, its name, and its probability (or the value)."""
    from mergekit_bert import api
    from mergekit_bert.composing.prediction import predict_table, the_task
    from mergekit_bert.data.rows import Rows, read_rows, read_table
    from mergekit_bert.errors import DataError
    from mergekit_bert.files import refuse_existing, write_atomic

    if out is not None:
        refuse_existing(out, force)
    model = api.load(file)
    found = the_task(model, task)
    if text and rows is not None:
        raise DataError("mbert predict", "texts and --input", "one of them", "drop one")
    if text:
        table = Rows((tuple(text),), None, "arguments")
    elif rows is not None:
        table = read_rows(rows, found, labelled=False)
    elif sys.stdin.isatty():
        raise DataError(
            "mbert predict",
            "no texts",
            f"{' and '.join(found.text)} as arguments, --input FILE, or a TSV on standard input",
            "give one of them",
        )
    else:
        table = read_table("standard input", sys.stdin.buffer.read(), found)
    answer = predict_table(api.predictor(model, base=base), found, table)
    if out is not None:
        write_atomic(out, answer.encode())
    else:
        sys.stdout.write(answer)
