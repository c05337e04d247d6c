"""The run log: JSON lines, and TensorBoard if requested. It never influences the run."""

import json
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mergekit_bert.errors import MissingExtraError, OutputError

LOG = "log.jsonl"
BOARD = "tensorboard"
"""The folder of TensorBoard's files."""


@runtime_checkable
class Writer(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Record one figure."""

    def close(self) -> None:
        """Flush and close."""


class RunLog:
    """Writes each event as one JSON line, and its numbers to TensorBoard if requested."""

    def __init__(self, folder: Path, keep_bytes: int, tensorboard: bool, step: int) -> None:
        """Go on after the first ``keep_bytes`` of an earlier log (0: a new one)."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_links(folder)
            self._file = open(folder / LOG, "ab", opener=_opened)  # noqa: SIM115 (Path.open takes no opener)
            self._file.truncate(min(keep_bytes, self.bytes()))
        except OSError as error:
            raise OutputError(
                str(folder),
                (error.strerror or str(error)).lower(),
                "a folder that can be written",
                "choose another `out`",
            ) from error
        self._board = _tensorboard(folder, step) if tensorboard else None

    def write(self, event: dict[str, Any]) -> int:
        """Append ``event``; returns the log's length in bytes."""
        self._file.write((json.dumps(event, sort_keys=True) + "\n").encode())
        self._file.flush()
        if self._board is not None:
            for name, value in event.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, event["step"])
        return self.bytes()

    def bytes(self) -> int:
        """The log's length so far."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _refuse_links(folder: Path) -> None:
    """Raise OutputError for a link where a log should be: what is written would land elsewhere."""
    for path in (folder / LOG, folder / BOARD):
        if path.is_symlink() or (path.name == LOG and path.exists() and not path.is_file()):
            found = "a symbolic link" if path.is_symlink() else "no regular file"
            raise OutputError(str(path), found, "the log of this run", "remove it, or choose another `out`")


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _tensorboard(folder: Path, step: int) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "`tensorboard`", "the package tensorboard is not installed", "tensorboard", "install mbert[tensorboard]"
        ) from error
    writer: Writer = SummaryWriter(str(folder / BOARD), purge_step=step or None)
    return writer
