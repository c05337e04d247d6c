"""Many cases in child processes, which a watchdog kills and replaces when one hangs, dies or grows old.

An alarm in the process would not do: it does not stop C code. The children are forked, so that a new one costs nothing.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from tests.fuzz.bench import MEMORY, Bench, Outcome

CPU_SECONDS, WALL_SECONDS = 5.0, 60.0
"""A case hangs that has computed so long, or, on a machine that does other things, has lasted so long."""
_FRESH = 400
"""Cases after which a worker is replaced, so that what a case leaves behind does not add up."""
_FILE = 2**28
"""Bytes that a file may have."""
_TICK = 0.1
_STACK = "stack.txt"

_fork = multiprocessing.get_context("fork")


@dataclass
class _Worker:
    """A child, and the case that it is at."""

    process: ForkProcess
    pipe: Connection
    room: Path
    done: int = 0
    case: str | None = None
    since: float = 0.0
    spent: float = 0.0


def run(bench: Bench, cases: Iterable[str], workers: int = 1) -> Iterator[Outcome]:
    """The verdicts on ``cases``, in the order in which they come."""
    waiting = iter(cases)
    pool = [_start(bench, number) for number in range(workers)]
    try:
        busy = [worker for worker in pool if _give(worker, waiting)]
        while busy:
            wait([worker.pipe for worker in busy], timeout=_TICK)
            for place, worker in enumerate(pool):
                if worker.case is None:
                    continue
                outcome = _outcome(bench, worker)
                if outcome is None:
                    continue
                yield outcome
                if outcome.verdict == "hang" or not worker.process.is_alive() or worker.done >= _FRESH:
                    _stop(worker)
                    worker = pool[place] = _start(bench, place)
                _give(worker, waiting)
            busy = [worker for worker in pool if worker.case is not None]
    finally:
        for worker in pool:
            _stop(worker)


def _start(bench: Bench, number: int) -> _Worker:
    ours, theirs = _fork.Pipe()
    room = bench.root / f"room{number}"
    sys.stdout.flush()
    process = _fork.Process(target=_work, args=(bench, room, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, room)


def _work(bench: Bench, room: Path, pipe: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    bench.enter(room.name)
    stack = (bench.root / f"{room.name}.{_STACK}").open("w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    _limit()
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(bench.judge(case))


def _limit() -> None:
    """Refuse memory beyond what there is now and one GiB, and huge files."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _give(worker: _Worker, waiting: Iterator[str]) -> bool:
    """Give the next case, if there is one."""
    worker.case = next(waiting, None)
    if worker.case is not None:
        worker.since, worker.spent = time.monotonic(), _cpu_seconds(worker.process.pid)
        worker.pipe.send(worker.case)
    return worker.case is not None


def _outcome(bench: Bench, worker: _Worker) -> Outcome | None:
    """The verdict on the worker's case; None while it is at work."""
    assert worker.case is not None
    if worker.pipe.poll():
        try:
            outcome: Outcome = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            return _cut_short(bench, worker, "crash", f"the process died ({_code(worker.process.exitcode)})")
        worker.done += 1
        return outcome
    lasted = time.monotonic() - worker.since
    if lasted < CPU_SECONDS:
        return None
    if lasted < WALL_SECONDS and _cpu_seconds(worker.process.pid) - worker.spent < CPU_SECONDS:
        return None
    if worker.process.pid is not None:
        os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(3 * _TICK)
    return _cut_short(bench, worker, "hang", f"no end after {lasted:.0f} s")


def _cut_short(bench: Bench, worker: _Worker, verdict: str, error: str) -> Outcome:
    """The outcome of a case that its worker cannot tell any more; the stack is what Python's fault handler wrote."""
    assert worker.case is not None
    spoiled = bench.spoil(worker.case)
    path = bench.root / f"{worker.room.name}.{_STACK}"
    trace = path.read_text(errors="replace") if path.exists() else ""
    lines = [line.strip() for line in trace.splitlines() if "/mergekit_bert/" in line]
    at = lines[0].rpartition("/mergekit_bert/")[2].replace('", line ', ":") if lines else ""
    return Outcome(
        worker.case,
        spoiled.specimen,
        spoiled.file,
        spoiled.mutation.name,
        spoiled.told,
        verdict,
        "unknown",
        round(time.monotonic() - worker.since, 1),
        False,
        error,
        at,
        trace[:8000],
    )


def _code(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _cpu_seconds(pid: int | None) -> float:
    """What a process has computed so far; 0 where nothing tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join()
