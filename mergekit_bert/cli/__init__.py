"""The command line: ``mbert COMMAND``. One file per command; heavy imports happen when a command needs them."""

import sys
import warnings
from importlib import metadata
from typing import Annotated, NoReturn, TextIO

import typer

from mergekit_bert.cli import (
    bench,
    compare,
    convert,
    doctor,
    evaluate,
    finetune,
    inspect,
    merge,
    methods,
    predict,
    quickstart,
    sample,
    tasks,
    train_adapter,
)
from mergekit_bert.errors import MbertError, MbertWarning

app = typer.Typer(
    name="mbert",
    help="Train one small adapter per task on a frozen BERT-like encoder, merge or route the adapters, and know from "
    "one table what each choice costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _start(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"mbert {metadata.version('mbert')}")
        raise typer.Exit


for _name, _module in (
    ("tasks", tasks),
    ("sample", sample),
    ("bench", bench),
    ("train-adapter", train_adapter),
    ("finetune", finetune),
    ("methods", methods),
    ("merge", merge),
    ("compare", compare),
    ("doctor", doctor),
    ("eval", evaluate),
    ("predict", predict),
    ("convert", convert),
    ("inspect", inspect),
    ("quickstart", quickstart),
):
    app.command(_name, epilog=_module.EXAMPLE)(_module.command)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, MbertWarning):
        print(f"note: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line: exit code 0 done, 1 the user can fix it (one line says how), 2 usage."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="mbert")
    except MbertError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'mbert'}: {(error.strerror or str(error)).lower()}; check the path and the disk")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
