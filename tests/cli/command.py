"""The command line called inside the process, through ``main`` as the installed program does."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mergekit_bert.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class _Terminal(io.TextIOWrapper):
    """Standard input as it is at a terminal."""

    def isatty(self) -> bool:
        return True


def mbert(*words: str | Path, stdin: bytes = b"", here: Path | None = None, terminal: bool = False) -> Done:
    """``mbert WORDS < stdin`` in the folder ``here``."""
    out, err = io.StringIO(), io.StringIO()
    given = (_Terminal if terminal else io.TextIOWrapper)(io.BytesIO(stdin), encoding="utf-8")
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["mbert", *map(str, words)]),
        mock.patch.object(sys, "stdin", given),
        mock.patch.dict(os.environ, {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}),
        contextlib.chdir(here or Path.cwd()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            code = 0
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that the block leaves every file below ``folder`` as it is, and adds none."""

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    yield
    assert contents() == before
