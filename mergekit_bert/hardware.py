"""The machine: device, precision, threads, random generators, and meters. Nothing else touches torch's global state."""

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from mergekit_bert.arguments import checked
from mergekit_bert.errors import ArgumentError
from mergekit_bert.registry import unknown

PRECISIONS = ("auto", "fp32", "bf16")
_PROBE_SIZE = 512
_RATE_SIZE = 2048
_PROBE_GAIN = 1.3


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """What computes: the first GPU's name, or the vector instructions of the CPU; the gain of bf16 hangs on it."""
    if default_device().type == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


@checked
def set_threads(count: int | None) -> None:
    """Use ``count`` CPU threads; ``None`` leaves torch's choice. Sums depend on it, so runs record it."""
    if count is not None and count < 1:
        raise ArgumentError("`count` of set_threads", f"{count}", "a whole number of at least 1", "correct it")
    if count is not None:
        torch.set_num_threads(count)


def threads() -> int:
    """How many CPU threads torch uses."""
    return torch.get_num_threads()


def generator(*seeds: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each tuple of seeds; torch's global one is never used."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**63)
    return torch.Generator(device).manual_seed(mixed)


@contextlib.contextmanager
def global_seed_kept() -> Iterator[None]:
    """Leave torch's global random state as it was, whatever the block (a library) draws from it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def pick_precision(asked: str, device: torch.device) -> torch.dtype:
    """``fp32`` or ``bf16`` as asked; ``auto`` is bf16 where a quick matrix product shows that it is faster."""
    if asked not in PRECISIONS:
        raise unknown("precision", asked, list(PRECISIONS))
    if asked == "auto":
        faster = _seconds(torch.float32, device) > _PROBE_GAIN * _seconds(torch.bfloat16, device)
        return torch.bfloat16 if faster else torch.float32
    return torch.bfloat16 if asked == "bf16" else torch.float32


def _seconds(dtype: torch.dtype, device: torch.device, size: int = _PROBE_SIZE) -> float:
    """Least seconds of a square matrix product: what else the machine does only ever adds."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product."""
    return 2 * _RATE_SIZE**3 / _seconds(dtype, device, _RATE_SIZE)


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Matrix products in ``dtype`` for this thread; float32 is no change."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class MemoryMeter:
    """How far the process's resident memory rose above where it stood; None where the system does not say."""

    above: int | None = None


@contextlib.contextmanager
def memory_meter(period: float = 0.01) -> Iterator[MemoryMeter]:
    """Sample the resident memory while the block runs (Linux alone tells it)."""
    meter, statm, page = MemoryMeter(), Path("/proc/self/statm"), resource.getpagesize()
    if not statm.exists():
        yield meter
        return

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    start, done = resident(), threading.Event()
    meter.above = 0

    def sample() -> None:
        while not done.is_set():
            meter.above = max(meter.above or 0, resident() - start)
            done.wait(period)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        done.set()
        thread.join()


@dataclass
class GpuMeter:
    """GPU memory in use, sampled by a thread through NVML; ``None`` figures where there is no NVIDIA GPU."""

    samples: list[int] = field(default_factory=list)

    @property
    def average_bytes(self) -> int | None:
        """Mean of the samples."""
        return round(fmean(self.samples)) if self.samples else None

    @property
    def maximum_bytes(self) -> int | None:
        """Largest sample."""
        return max(self.samples, default=None)


@contextlib.contextmanager
def gpu_meter(device: torch.device, period: float = 0.5) -> Iterator[GpuMeter]:
    """Sample the memory in use on ``device`` while the block runs."""
    meter = GpuMeter()
    if device.type != "cuda":
        yield meter
        return
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            meter.samples.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
            done.wait(period)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        done.set()
        thread.join()
        pynvml.nvmlShutdown()
