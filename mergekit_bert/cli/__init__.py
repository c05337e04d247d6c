"""The command line: ``mbert COMMAND``. One file per command; heavy imports happen when a command needs them."""

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from mergekit_bert.cli import (
    bench,
    compare,
    convert,
    doctor,
    embed,
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
from mergekit_bert.cli.spelling import in_flags
from mergekit_bert.cli.streams import Stream, standard_streams
from mergekit_bert.errors import MbertError, MbertWarning
from mergekit_bert.terminal import say
from mergekit_bert.text import one_line, printable

_CUT_OFF = 141
"""The exit code if the reader of standard output has gone, as shells report SIGPIPE."""


@contextlib.contextmanager
def _escaped() -> Iterator[None]:
    """Escape the parts of the command line that a usage error repeats."""
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "message", None), str):
            error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


class _Commands(TyperGroup):
    def make_context(self, *given: Any, **options: Any) -> Any:
        with _escaped():
            return super().make_context(*given, **options)

    def invoke(self, ctx: Any) -> Any:
        with _escaped():
            return super().invoke(ctx)


app = typer.Typer(
    name="mbert",
    cls=_Commands,
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
        say(f"mbert {metadata.version('mbert')}")
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
    ("embed", embed),
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
        say(f"note: {one_line(in_flags(str(message)))}", error=True)


def main() -> None:
    """Run the command line: exit code 0 done, 1 the user can fix it (one line says how), 2 usage."""
    # Read when torch is loaded. OpenMP threads spin long while they wait, and on a busy machine take others' cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    warnings.showwarning = _show_warning
    with standard_streams() as out:
        code = _run() or _end(out)
    sys.exit(code)


def _run() -> int:
    """The exit code of the command."""
    try:
        app(prog_name="mbert")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MbertError as error:
        return _fail(in_flags(str(error)))
    except OSError as error:
        return _fail(f"{error.filename or 'mbert'}: {_reason(error)}; check the path and the disk")
    return 0


def _end(out: Stream) -> int:
    """The exit code of a finished command: it depends on whether its output could be printed."""
    out.flush()
    if out.lost is None:
        return 0
    if out.lost.errno == errno.EPIPE:
        return _CUT_OFF
    return _fail(
        f"standard output: {_reason(out.lost)}, so what was printed is lost; expected a writable one; "
        "redirect it elsewhere (the files that the command writes are complete)"
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _fail(message: str) -> int:
    say(f"error: {one_line(message)}", error=True)
    return 1
