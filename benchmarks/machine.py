"""What a result must say about where it comes from."""

import datetime
import os
import platform
import sys
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
