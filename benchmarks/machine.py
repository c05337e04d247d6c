"""What a result must say about where it comes from."""

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Machine, date, command and versions."""
    model = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    packages = ("mbert", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            ["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *(_plain(word) for word in sys.argv[1:])]
        ),
        "machine": {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _plain(word: str) -> str:
    return "DIR" if Path(word).is_absolute() else word


def matrix_rates() -> dict[str, float]:
    """Floating-point operations a second of a large matrix product, by precision."""
    import torch

    from mergekit_bert.hardware import default_device, matrix_rate

    torch.set_num_threads(os.cpu_count() or 1)
    return {
        name: matrix_rate(dtype, default_device())
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }


def write_result(name: str, value: dict[str, Any]) -> None:
    """Write ``results/<name>.json``."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    print(f"wrote {path.parent.name}/{path.name}")
