"""Standard streams in any state: closed, full, cut off by their reader, or unable to encode.

None of this stops a command: its files are written. Output that cannot be printed is dropped, and reported at the end.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Stream:
    """A text stream that never fails to write; ``lost`` is the reason if something was dropped."""

    def __init__(self, stream: Any) -> None:
        """Over ``stream``; None: it was closed before the program began."""
        self._closed = stream is None
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.lost: OSError | None = None
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        """Everything else comes from the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, or drop it."""
        if self._closed and text:
            self.lost = OSError("it is closed")
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush the buffer, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Remember ``error``, and discard what is still buffered: the interpreter would try again when it ends."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Make ``sys.stdin``, ``stdout`` and ``stderr`` exist and never fail to write; yields standard output."""
    for number in range(3):  # else the next file that is opened would get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    before = sys.stdin, sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdin, sys.stdout, sys.stderr = before
