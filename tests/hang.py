"""A guard against what would never end, and a pattern that never ends where matching goes back and tries again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

HANGS = r"(([a-z0-9]|\.|_)+)+!"


@contextmanager
def in_time(seconds: int = 30) -> Iterator[None]:
    """Fail where the block hangs."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
