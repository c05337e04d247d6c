"""Training checkpoints: everything needed to resume a run bit by bit, in one safetensors file, written atomically.

Parameters, the best parameters, the optimizer's state and the states of the generators are stored as tensors, the
progress as JSON. Whatever follows from the run's description (learning rates, weight decay) is not stored, so that a
checkpoint cannot change it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_bert.errors import ModelFileError
from mergekit_bert.schema import Count, Finite, Plain, Schema, validate
from mergekit_bert.strict import STRICT
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training.objective import Objective

CHECKPOINT = "checkpoint.safetensors"
_FORMAT = 2
_STATE = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of every parameter that it has updated: the number of steps, and two moments of its shape."""


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch: the mean loss of its steps, and the score on the held-out rows."""

    __pydantic_config__: ClassVar = STRICT

    train_loss: Finite
    score: Finite


@dataclass
class Progress:
    """The progress of a run: steps done, losses since the last finished epoch, and the results of the epochs."""

    __pydantic_config__: ClassVar = STRICT

    step: Count = 0
    losses: list[Finite] = dataclasses.field(default_factory=list)
    epochs: list[Epoch] = dataclasses.field(default_factory=list)
    seconds: Annotated[Finite, Field(ge=0)] = 0.0
    log_bytes: Count = 0

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best score; -1 before the first epoch has ended."""
        scores = [epoch.score for epoch in self.epochs]
        return scores.index(max(scores)) if scores else -1

    @property
    def best_score(self) -> float | None:
        """The best score so far."""
        return self.epochs[self.best_epoch].score if self.epochs else None


class _Record(Schema):
    """A checkpoint's metadata."""

    format: int
    kind: str
    run: dict[str, Plain]
    progress: Progress


def save_checkpoint(
    path: Path,
    objective: Objective,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write the checkpoint of a run, replacing an earlier one."""
    tensors = {f"value.{name}": parameter.detach() for name, parameter in objective.parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    tensors |= {f"generator.{name}": source.get_state() for name, source in objective.generators.items()}
    for place, kept in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{key}": tensor for key, tensor in kept.items()}
    metadata = {"format": _FORMAT, "kind": "checkpoint", "run": dict(objective.run)}
    write_tensors(path, tensors, metadata | {"progress": dataclasses.asdict(progress)})


def load_checkpoint(
    path: Path, objective: Objective, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Restore a run from its checkpoint; returns its progress, and the best parameters so far.

    If the objective ignores the checkpoint because it belongs to another run, the progress is that of a new run.
    Raises the objective's error for a broken checkpoint, and what ``objective.continues`` raises.
    """
    try:
        tensors, metadata = read_tensors(path)
    except ModelFileError as error:
        raise objective.error(str(path), error.found, error.expected, objective.if_broken) from error
    if metadata.get("format") != _FORMAT or metadata.get("kind") != "checkpoint":
        raise objective.error(str(path), "not a checkpoint of this version", f"format {_FORMAT}", objective.if_broken)
    try:
        record = validate(_Record, metadata)
        if not objective.continues(path, record.run):
            return Progress(), {}
        _check_progress(record.progress, objective)
        _check_tensors(tensors, record.progress, objective, optimizer)
        state = _state(tensors, record.progress, optimizer)
        _restore(tensors, objective, optimizer, state)
    except (ValueError, RuntimeError) as error:
        raise objective.error(
            str(path), f"a broken checkpoint ({error})", "one as mbert writes it", objective.if_broken
        ) from error
    return record.progress, {name: tensors[f"best.{name}"] for name in objective.parameters if record.progress.epochs}


def _check_progress(progress: Progress, objective: Objective) -> None:
    """Raise ValueError for progress that a run cannot have."""
    ended = progress.step // objective.epoch if objective.epoch else 0
    good = (
        1 <= progress.step <= objective.steps
        and len(progress.epochs) == ended
        and len(progress.losses) == progress.step - ended * objective.epoch
    )
    if not good:
        raise ValueError("numbers of epochs, steps and losses do not fit together")


def _check_tensors(
    tensors: Mapping[str, Tensor], progress: Progress, objective: Objective, optimizer: torch.optim.Optimizer
) -> None:
    """Raise ValueError unless the file contains exactly the tensors of a run with this progress, in their shapes."""
    prefixes = ["value", *(["best"] if progress.epochs else ())]
    expected: dict[str, Tensor] = {
        f"{prefix}.{name}": tensor for prefix in prefixes for name, tensor in objective.parameters.items()
    }
    expected |= {f"generator.{name}": source.get_state() for name, source in objective.generators.items()}
    for place, parameter in enumerate(_placed(optimizer)):
        if f"optimizer.{place}.step" in tensors:  # a parameter that has had no gradient so far has no state
            shapes = (torch.zeros(()), parameter, parameter)
            expected |= {f"optimizer.{place}.{key}": tensor for key, tensor in zip(_STATE, shapes, strict=True)}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{odd[0]} is missing, or not expected")
    for name, tensor in expected.items():
        if (tensors[name].shape, tensors[name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}")


def _placed(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order of the optimizer's state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(
    tensors: Mapping[str, Tensor], progress: Progress, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state of every updated parameter; raises ValueError for an impossible number of steps."""
    state = {
        place: {key: tensors[f"optimizer.{place}.{key}"] for key in _STATE}
        for place in range(len(_placed(optimizer)))
        if f"optimizer.{place}.step" in tensors
    }
    steps = [float(kept["step"]) for kept in state.values()]
    if not steps or not all(1 <= number <= progress.step and number.is_integer() for number in steps):
        raise ValueError("the optimizer's number of steps does not fit the run's")
    return state


def _restore(
    tensors: Mapping[str, Tensor],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    state: dict[int, dict[str, Tensor]],
) -> None:
    for name, source in objective.generators.items():
        source.set_state(tensors[f"generator.{name}"])
    with torch.no_grad():
        for name, parameter in objective.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
