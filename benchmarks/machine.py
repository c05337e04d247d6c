"""What a result must say about where it comes from."""

import datetime
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Machine, date, command and versions."""
    model = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    packages = ("mbert", "torch", "transformers", "safetensors", "numpy", "scipy")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *(_plain(word) for word in sys.argv[1:])]),
        "machine": {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _plain(word: str) -> str:
    return "DIR" if Path(word).is_absolute() else word


def matrix_rate() -> dict[str, float]:
    """Floating-point operations a second of a large matrix product: the best of several."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    size, found = 2048, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            left @ left
            times.append(time.perf_counter() - start)
        found[name] = 2 * size**3 / min(times)
    return found


def write_result(name: str, value: dict[str, Any]) -> None:
    """Write ``results/<name>.json``."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    print(f"wrote {path.parent.name}/{path.name}")
