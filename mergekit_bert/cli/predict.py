"""``mbert predict``: predictions for texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = 'Example: mbert predict merged.safetensors --task sts "A cat sleeps." "A kitten naps."'


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, a PEFT folder or a model folder.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="One row: a text, or two texts for a pair task.", show_default="none")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Which of the file's tasks.", show_default="the only one, or the input's column task"),
    ] = None,
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
    """Predict with any model file. Prints a TSV: texts, label, name of the label, and its probability (or the value).

    The input may mix rows of several tasks: without --task, each row names its task in the column task.
    """
    from mergekit_bert.errors import DataError
    from mergekit_bert.files import write_atomic
    from mergekit_bert.outputs import Output, claimed, written
    from mergekit_bert.terminal import say_tsv

    if text and rows is not None:
        raise DataError("mbert predict", "texts and --input", "one of them", "drop one")
    outputs = [Output(out, force)] if out is not None else []
    with claimed(*outputs):
        answer = _answer(file, text, rows, task, base)
        for output in outputs:
            with written(output) as (part,):
                write_atomic(part, answer.encode())
        if out is None:
            say_tsv(answer)


def _answer(file: Path, text: list[str] | None, rows: Path | None, task: str | None, base: str | None) -> str:
    """The table of predictions as TSV."""
    from mergekit_bert import api
    from mergekit_bert.data.readers import read_records, read_table
    from mergekit_bert.data.rows import Rows, parse_requests, parse_rows
    from mergekit_bert.errors import DataError
    from mergekit_bert.models.prediction import mixed_table, predict_table, the_task

    model = api.load(file, base=base)
    mixed = task is None and len(model.tasks) > 1 and not text
    columns = ("task",) if mixed else the_task(model, task).text
    if not text and rows is None and sys.stdin.isatty():
        raise DataError(
            "mbert predict",
            "no texts",
            f"{' and '.join(columns)} as arguments, --input FILE, or a TSV with a header on standard input",
            "give one of them",
        )
    where = "arguments" if text else "standard input" if rows is None else str(rows)
    if text:
        table = Rows((tuple(text),), None, where)
    else:
        more = [column for one in model.tasks for column in one.text]
        records = read_records(rows, columns, more) if rows else read_table(where, sys.stdin.buffer.read, columns)
        if mixed:
            requests = parse_requests(where, records, {one.name: one for one in model.tasks})
        else:
            table = parse_rows(where, records, the_task(model, task), labelled=False)
    predictor = api.predictor(model, base=base)
    return mixed_table(predictor, requests) if mixed else predict_table(predictor, the_task(model, task), table)
