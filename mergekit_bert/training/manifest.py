"""The run folder: what lies beside an output while it is made, and what tells afterwards how it was made.

Beside the output ``X`` lies ``X.run`` with the log, ``run.json`` and a checkpoint while the run is unfinished, and the
manifest when it has ended.
"""

import contextlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_bert.errors import TrainingError
from mergekit_bert.files import beside, file_fingerprint, refuse_existing, write_json
from mergekit_bert.hardware import GpuMeter, default_device, peak_memory_bytes
from mergekit_bert.training.loop import Outcome, Setting
from mergekit_bert.training.resume import CHECKPOINT, check_same
from mergekit_bert.training.trainable import Trainable

MANIFEST = "manifest.json"
_RUN = "run.json"
_PACKAGES = ("mbert", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Control:
    """How a run meets what lies at its output already, and how it is watched."""

    resume: bool = False
    force: bool = False
    tensorboard: bool = False
    show: bool = True


def run_folder(out: Path) -> Path:
    """Where the log, the manifest and the checkpoint of the run that makes ``out`` lie."""
    return beside(out, ".run")


def claim(out: Path, folder: Path, control: Control) -> bool:
    """Whether the run is finished already; raises when something lies in its way."""
    unfinished = (folder / CHECKPOINT).exists()
    if control.resume:
        return is_finished(out)
    refuse_existing(out, control.force)
    if unfinished and not control.force:
        raise TrainingError(
            str(folder),
            "an unfinished run",
            "a new place, or a decision about it",
            "give --resume to go on or --force to start over",
        )
    shutil.rmtree(folder, ignore_errors=True)
    return False


def is_finished(out: Path) -> bool:
    """Whether the run that makes ``out`` has ended."""
    return out.exists() and not any((run_folder(out) / name).exists() for name in (_RUN, CHECKPOINT))


def recorded(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """How the run of ``folder`` was begun, and the file that says so; None where none does."""
    for name in (_RUN, MANIFEST):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads((folder / name).read_text(encoding="utf-8"))
            return folder / name, dict(value if name == _RUN else value["run"])
    return None


def check_recorded(folder: Path, run: Mapping[str, Any], finished: bool) -> None:
    """Raise TrainingError unless the run of ``folder``, finished or not, was begun as this one."""
    earlier = recorded(folder)
    if earlier is not None:
        # A finished file may be reused whatever the number of threads is now; an unfinished run must keep it.
        check_same(*earlier, {key: value for key, value in run.items() if not (finished and key == "threads")})
    elif finished:
        raise TrainingError(
            str(folder / MANIFEST),
            "the output exists, but no manifest says how it was made",
            "a run to resume",
            "choose another --out or give --force",
        )


def begin(setting: Setting) -> None:
    """Write down how the run is begun."""
    write_json(setting.folder / _RUN, setting.run)


def provenance(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """What the model file says about its training: nothing that differs between equal runs."""
    return {
        "examples": len(setting.train),
        "held_out": len(setting.held_out),
        "truncated": setting.train.truncated + setting.held_out.truncated,
        "epochs_done": outcome.progress.epoch,
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.progress.step,
        "optimizer": "AdamW",
        **setting.run["train"],
        **{key: setting.run[key] for key in ("lr", "head_lr", "precision", "threads", "data")},
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def finish(out: Path, folder: Path, setting: Setting, outcome: Outcome, work: Trainable, meter: GpuMeter) -> None:
    """Write the manifest and drop the checkpoint."""
    trainable = sum(p.numel() for p in work.parameters.values())
    total = sum(p.numel() for p in work.model.parameters())
    write_json(
        folder / MANIFEST,
        {
            "output": out.name,
            "sha256": file_fingerprint(out),
            "run": setting.run,
            "training": provenance(setting, outcome),
            "history": outcome.progress.history,
            "parameters": {
                "trainable": trainable,
                "total": total,
                "reduction_percent": round(100 * (1 - trainable / total), 3),
            },
            "wall_seconds": round(outcome.progress.seconds, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "gpu_memory_bytes": {"average": meter.average_bytes, "maximum": meter.maximum_bytes},
            "device": str(default_device()),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    )
    for name in (_RUN, CHECKPOINT):  # the checkpoint last: while it is there, the run is unfinished
        (folder / name).unlink(missing_ok=True)
