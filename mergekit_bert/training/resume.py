"""Checkpoints: everything the loop needs to go on to the same bits, in one atomic safetensors file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.errors import TrainingError
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training.trainable import Trainable

CHECKPOINT = "checkpoint.safetensors"
_FORMAT = 1


@dataclass
class Progress:
    """Where the loop stands: the next batch of an epoch, the best epoch so far, and the running figures."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best_epoch: int = -1
    best_score: float | None = None
    history: list[dict[str, int | float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    log_bytes: int = 0


def save_checkpoint(
    folder: Path,
    run: dict[str, Any],
    progress: Progress,
    work: Trainable,
    optimizer: torch.optim.AdamW,
    best: dict[str, Tensor],
) -> None:
    """Write the checkpoint of the run described by ``run``."""
    tensors = {f"value.{name}": parameter.detach() for name, parameter in work.parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    tensors["generator"] = work.source.get_state()
    for name, parameter in work.parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state[parameter]:
                tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    metadata = {"format": _FORMAT, "kind": "checkpoint", "run": run, "progress": dataclasses.asdict(progress)}
    write_tensors(folder / CHECKPOINT, tensors, metadata)


def check_same(path: Path, earlier: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise TrainingError naming what differs unless the run recorded in ``path`` is ``run``."""
    told = []
    for key, now in run.items():
        was = earlier.get(key)
        pairs = {key: (was, now)}
        if isinstance(now, dict) and isinstance(was, dict):
            pairs = {f"{key}.{name}": (was.get(name), value) for name, value in now.items()}
        told += [f"{name} was {one!r}, now {two!r}" for name, (one, two) in sorted(pairs.items()) if one != two]
    if told:
        raise TrainingError(
            str(path),
            f"another run ({', '.join(sorted(told, key=len))})",  # a message is cut where it gets too long
            "the same command as before",
            "repeat it, choose another --out, or start over with --force",
        )


def load_checkpoint(
    folder: Path, run: dict[str, Any], work: Trainable, optimizer: torch.optim.AdamW
) -> tuple[Progress, dict[str, Tensor]]:
    """Put the run back where the checkpoint left it; raises TrainingError when it is of another run."""
    path = folder / CHECKPOINT
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT or metadata.get("kind") != "checkpoint":
        raise TrainingError(str(path), "not a checkpoint of this version", f"format {_FORMAT}", "start with --force")
    try:
        check_same(path, metadata["run"], run)
        return _restore(tensors, Progress(**metadata["progress"]), work, optimizer)
    except (KeyError, TypeError, RuntimeError) as error:
        found = " ".join(str(error).split())[:160]
        raise TrainingError(
            str(path), f"a broken checkpoint ({found})", "one as mbert writes it", "start over with --force"
        ) from error


def _restore(
    tensors: Mapping[str, Tensor], progress: Progress, work: Trainable, optimizer: torch.optim.AdamW
) -> tuple[Progress, dict[str, Tensor]]:
    with torch.no_grad():
        for name, parameter in work.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            if progress.step:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(progress.step)),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
                }
    work.source.set_state(tensors["generator"])
    return progress, {name: tensors[f"best.{name}"] for name in work.parameters if f"best.{name}" in tensors}
