"""Checkpoints: everything the loop needs to go on to the same bits, in one atomic safetensors file."""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_bert.errors import ModelFileError, TrainingError
from mergekit_bert.schema import Count, Finite, Plain, Schema, SchemaError, validate
from mergekit_bert.strict import STRICT
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training.trainable import Trainable

CHECKPOINT = "checkpoint.safetensors"
_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter."""


@dataclass
class Progress:
    """Where the loop stands: the next batch of an epoch, the best epoch so far, and the running figures."""

    __pydantic_config__: ClassVar = STRICT

    epoch: Count = 0
    batch: Count = 0
    step: Count = 0
    loss_sum: Finite = 0.0
    best_epoch: Annotated[int, Field(ge=-1, lt=2**53)] = -1
    best_score: Finite | None = None
    history: list[dict[str, int | Finite]] = dataclasses.field(default_factory=list)
    seconds: Annotated[Finite, Field(ge=0)] = 0.0
    log_bytes: Count = 0


class _Record(Schema):
    """A checkpoint's metadata."""

    format: int
    kind: str
    run: dict[str, Plain]
    progress: Progress


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
        for key in _MOMENTS:
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
        differ = [pair for pair in pairs.items() if pair[1][0] != pair[1][1]]
        differ.sort(key=lambda pair: (not pair[0].endswith(".name"), pair[0]))  # a name says most
        told += [f"{name} was {reprlib.repr(one)}, now {reprlib.repr(two)}" for name, (one, two) in differ]
    if told:
        raise TrainingError(
            str(path),
            f"another run ({', '.join(sorted(told, key=len))})",  # a message is cut where it gets too long
            "the same command as before",
            "repeat it, choose another `out`, or start over with `force`",
        )


def load_checkpoint(
    folder: Path, run: dict[str, Any], work: Trainable, optimizer: torch.optim.AdamW, batches: int
) -> tuple[Progress, dict[str, Tensor]]:
    """Put the run, of so many ``batches`` an epoch, back where the checkpoint left it.

    Raises TrainingError when it is of another run, or is not whole.
    """
    path = folder / CHECKPOINT
    try:
        tensors, metadata = read_tensors(path)
    except ModelFileError as error:
        raise TrainingError(str(path), error.found, error.expected, "start over with `force`") from error
    if metadata.get("format") != _FORMAT or metadata.get("kind") != "checkpoint":
        raise TrainingError(str(path), "not a checkpoint of this version", f"format {_FORMAT}", "start with `force`")
    try:
        record = validate(_Record, metadata)
        check_same(path, record.run, run)
        _check_progress(record.progress, run["train"]["epochs"], batches)
        _check_tensors(tensors, record.progress, work)
        return _restore(tensors, record.progress, work, optimizer)
    except (SchemaError, ValueError, RuntimeError) as error:
        raise TrainingError(
            str(path), f"a broken checkpoint ({error})", "one as mbert writes it", "start over with `force`"
        ) from error


def _check_progress(progress: Progress, epochs: int, batches: int) -> None:
    """Raise ValueError for a place where the loop never stands."""
    good = (
        progress.epoch <= epochs
        and progress.batch < batches
        and progress.step == progress.epoch * batches + progress.batch
        and len(progress.history) == progress.epoch
        and progress.best_epoch < progress.epoch
        and (progress.best_epoch < 0) == (progress.best_score is None) == (progress.epoch == 0)
    )
    if not good:
        raise ValueError("numbers of epochs, batches and steps that do not fit together")


def _check_tensors(tensors: Mapping[str, Tensor], progress: Progress, work: Trainable) -> None:
    """Raise ValueError unless the file holds exactly the tensors of ``work`` at this place, in their shapes."""
    kinds = ["value", *(_MOMENTS if progress.step else ()), *(["best"] if progress.epoch else ())]
    expected: dict[str, Tensor] = {f"{kind}.{name}": one for kind in kinds for name, one in work.parameters.items()}
    expected["generator"] = work.source.get_state()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{odd[0]} is missing, or not expected")
    for name, one in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (one.shape, one.dtype):
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}")


def _restore(
    tensors: Mapping[str, Tensor], progress: Progress, work: Trainable, optimizer: torch.optim.AdamW
) -> tuple[Progress, dict[str, Tensor]]:
    work.source.set_state(tensors["generator"])
    with torch.no_grad():
        for name, parameter in work.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            if progress.step:
                moments = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    return progress, {name: tensors[f"best.{name}"] for name in work.parameters if progress.epoch}
