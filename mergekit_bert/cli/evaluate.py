"""``mbert eval``: a model's scores, compared with its adapters and full fine-tuning."""

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options

EXAMPLE = "Example: mbert eval merged.safetensors --data DIR --json scores.json"


def command(
    file: Annotated[Path, typer.Argument(help="An adapter, merged or ensemble file, a PEFT folder or a model folder.")],
    data: options.Data = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this task, by name, or by its YAML file if that says where the rows are; may be repeated.",
            show_default="all in the file",
        ),
    ] = None,
    base: options.ModelBase = None,
    json: options.Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.", show_default="not")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Folder for the predictions, one <task>.tsv each.", show_default="<file>.predictions/"),
    ] = None,
    threads: options.Threads = None,
    force: options.Force = False,
) -> None:
    """Score every task in the file on its dev rows, next to its single adapters, a linear probe and full fine-tuning.

    The reference scores are those recorded by train-adapter, finetune and eval. A missing one is shown as –, and the
    command that produces it is printed. Intervals are 95 %, by bootstrap over the rows.
    """
    from mergekit_bert import api
    from mergekit_bert.evaluation.tables import as_markdown, as_text, comparison_table
    from mergekit_bert.files import beside, refuse_existing, write_atomic, write_json
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import Output, claimed, held, written
    from mergekit_bert.terminal import say, say_lines

    set_threads(threads)
    with contextlib.ExitStack() as holds:
        holds.enter_context(claimed(*(Output(path, force) for path in (json, markdown) if path is not None)))
        if predictions is not None:
            refuse_existing(predictions, force)
            holds.enter_context(held(predictions))
        elif os.access(file.parent, os.W_OK):
            predictions = beside(file, ".predictions")
        evaluation = api.evaluate(file, data, base=base, tasks=task or [], predictions=predictions, progress=True)
        comparison = evaluation.comparison
        say_lines(as_text(comparison_table(comparison)))
        for missing in comparison.missing:
            say(f"missing: {missing}")
        if json is not None:
            with written(Output(json, force)) as (part,):
                write_json(part, comparison.to_json())
        if markdown is not None:
            with written(Output(markdown, force)) as (part,):
                write_atomic(part, as_markdown(comparison_table(comparison)).encode())
