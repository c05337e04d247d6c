"""Outputs: what a user asked a command to write, held by one run at a time and never replaced by accident.

A run holds its output from before any long work until it has written it. It writes into a hidden place beside the
output and moves the finished thing there at the very end: without ``force`` only where still nothing lies, with it only
in the place of what mbert itself may have written.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_bert.errors import MbertError, OutputError
from mergekit_bert.files import (
    PART,
    SUFFIX,
    beside,
    kind_at,
    part_prefix,
    place,
    refuse_existing,
    replace,
    sweep_parts,
    told,
)
from mergekit_bert.tensorfile import is_foreign
from mergekit_bert.text import one_line

_PATIENCE = 0.2
"""Seconds in which a run that is just ending may let go of its output."""


@dataclass(frozen=True)
class Output:
    """A file at ``path``, or a folder of files whose names match the patterns ``inside``, the first always there."""

    path: Path
    force: bool = False
    inside: tuple[str, ...] = ()

    def refuse(self) -> None:
        """Raise OutputError for what lies there and must stay; ``force`` lets only mbert's own go."""
        with told(self.path):
            kind = kind_at(self.path)
            refuse_existing(self.path, self.force)
            reason = self._foreign(kind) if kind else ""
        if reason:
            raise OutputError(
                str(self.path),
                f"it exists already {reason}",
                "what `force` may replace: something that mbert wrote",
                "move it away, or choose another place",
            )

    def _foreign(self, kind: str) -> str:
        """Why what lies there is not mbert's; "" where it may be."""
        if kind != ("folder" if self.inside else "file"):
            return f"as a {kind}"
        if not self.inside:
            foreign = self.path.suffix == SUFFIX and is_foreign(self.path)
            return "with weights that another program wrote" if foreign else ""
        found = sorted(self.path.rglob("*"))
        for one in found:
            name = one.relative_to(self.path).as_posix()
            if not any(_fits(name, kind_at(one), pattern) for pattern in self.inside):
                return f"and holds {name}, which mbert does not write there"
        lacks = found and not (self.path / self.inside[0]).exists()
        return f"without the {self.inside[0]} that mbert writes there" if lacks else ""


def _fits(name: str, kind: str, pattern: str) -> bool:
    """Whether what lies at ``name`` in a folder is a file of the ``pattern``, or the subfolder of such files."""
    if kind == "folder":
        return pattern.startswith(f"{name}/")
    return kind == "file" and name.count("/") == pattern.count("/") and fnmatch(name, pattern)


@contextlib.contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold ``path``, and what lies beside it under its name, while the block runs; a thread may hold it again.

    Raises OutputError at once where another run or thread has it, or waits for that one. The lock is the operating
    system's, so it ends with the process; its file, ``.NAME.lock``, is removed.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        nested = lock.is_locked
        try:
            lock.acquire(timeout=-1 if wait else _PATIENCE)
        except Timeout as error:
            raise OutputError(
                str(path), "another mbert run is writing it", "one run at a time", "wait for it or choose another path"
            ) from error
    try:
        yield
    finally:
        if not nested:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()
        for folder in made:
            with contextlib.suppress(OSError):  # it is in use
                folder.rmdir()


def _lock(path: Path) -> FileLock:
    """The lock of ``path``, one for all its spellings; whether it is locked is a matter of each thread."""
    return FileLock(path.parent.resolve() / f".{beside(path, '.lock').name}", is_singleton=True)


@contextlib.contextmanager
def claimed(*outputs: Output) -> Iterator[None]:
    """Hold ``outputs`` while the block runs; raises OutputError before it, for any that may not be written.

    One that this thread holds has been looked at: what lies there now has come since, and the work is worth keeping.
    """
    paths = [output.path.absolute() for output in outputs]
    for output in outputs:
        if paths.count(output.path.absolute()) > 1:
            raise OutputError(str(output.path), "it is asked for twice", "a path for each output", "choose another")
    new = [output for output in outputs if not _lock(output.path).is_locked]
    for output in new:
        output.refuse()
    with contextlib.ExitStack() as stack:
        for output in new:
            stack.enter_context(held(output.path))
            output.refuse()  # the run that held it may have written it
        yield


@contextlib.contextmanager
def written(*outputs: Output, remedy: str = "") -> Iterator[list[Path]]:
    """Yield a place for each of ``outputs`` to be written at, and checked; it is moved there when the block ends well.

    Raises OutputError where something has appeared there in the meantime: the result is then kept under another name,
    unless ``remedy`` says how it can be had again. Other errors name the output, not the place.
    """
    with claimed(*outputs), contextlib.ExitStack() as stack:
        parts = [stack.enter_context(_part(output.path)) for output in outputs]
        try:
            yield parts
        except MbertError as error:
            raise _renamed(error, parts, outputs) from error
        refused = []
        for part, output in zip(parts, outputs, strict=True):
            try:
                _move(part, output, remedy)
            except OutputError as error:  # the others are no worse for it
                refused.append(error)
        if refused:
            raise refused[0]


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A place beside ``path``, of the same name."""
    with told(path):
        sweep_parts(path)
        folder = Path(tempfile.mkdtemp(prefix=part_prefix(path), suffix=PART, dir=path.parent))
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _renamed(error: MbertError, parts: Sequence[Path], outputs: Sequence[Output]) -> MbertError:
    """``error`` as one of the outputs."""
    texts = [error.where, error.found, error.expected, error.remedy]
    for part, output in zip(parts, outputs, strict=True):
        texts = [text.replace(one_line(str(part)), str(output.path)) for text in texts]
    return type(error)(*texts)


def _move(part: Path, output: Output, remedy: str) -> None:
    """Move what was made at ``part`` to where it belongs."""
    path = output.path
    with told(path):
        try:
            output.refuse()
            (replace if output.force else place)(part, path)
        except (OutputError, FileExistsError) as error:
            kept = "" if remedy else _kept(part, path)
            raise OutputError(
                str(path),
                "something else was written there while this run worked",
                "a free place",
                remedy or f"the result is kept as {kept}: move one of the two",
            ) from error


def _kept(part: Path, path: Path) -> Path:
    """Move ``part`` to a free name beside ``path`` that no pattern for models matches."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.kept{number}")
        with contextlib.suppress(FileExistsError):
            place(part, kept)
            break
    return kept
