"""The training loop for all objectives: AdamW, best epoch by held-out score, early stopping, resuming from checkpoints.

It does not depend on adapters, tasks or rows. Each step is a function of the Objective and the ``Progress``, so an
interrupted and resumed run ends with the same bits.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mergekit_bert.errors import MbertError
from mergekit_bert.progress import progress_bar
from mergekit_bert.training.checkpoint import CHECKPOINT, Epoch, Progress, load_checkpoint, save_checkpoint
from mergekit_bert.training.log import RunLog
from mergekit_bert.training.objective import Objective

_LOG_EVERY = 10


@dataclass(frozen=True)
class Outcome:
    """The result of a run, with the parameters of its best epoch (empty if the objective has no score).

    ``history`` has the log's entries of the epochs; ``keep`` writes a checkpoint of the finished run.
    """

    progress: Progress
    best: dict[str, Tensor]
    history: list[dict[str, Any]]
    keep: Callable[[], None]


def minimise(
    objective: Objective,
    folder: Path | None = None,
    checkpoint_seconds: float = 30.0,
    open_log: Callable[[Progress], RunLog] | None = None,
    show: bool = False,
) -> Outcome:
    """Minimise ``objective``, from the checkpoint in ``folder`` if there is one.

    A checkpoint is written there every ``checkpoint_seconds``; without ``folder``, none is written. ``open_log`` opens
    the log at the given progress. Raises the objective's error for a loss that is not finite.
    """
    optimizer, progress, best = make_optimizer(objective), Progress(), dict[str, Tensor]()
    path = folder / CHECKPOINT if folder is not None else None
    if path is not None and path.exists():
        progress, best = load_checkpoint(path, objective, optimizer)
    schedule = LambdaLR(optimizer, objective.rate, last_epoch=progress.step - 1)

    def keep() -> None:
        if path is not None:
            save_checkpoint(path, objective, progress, optimizer, best)

    saved = time.monotonic()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(open_log(progress))) if open_log is not None else None
        bar = stack.enter_context(progress_bar(objective.title, objective.steps, show))
        while progress.step < objective.steps and not _stopped(objective, progress):
            start, rate = time.monotonic(), schedule.get_last_lr()[0]
            loss = step(objective, optimizer, progress.step)
            schedule.step()
            progress.step += 1
            progress.losses.append(loss)
            progress.seconds += time.monotonic() - start
            if log is not None and progress.step % _LOG_EVERY == 0:
                where = {"step": progress.step, "epoch": len(progress.epochs)}
                log.write({**where, "loss": loss, "lr": rate, "seconds": round(progress.seconds, 3)})
            if objective.epoch and progress.step % objective.epoch == 0:
                best = _end_epoch(objective, progress, best)
                if log is not None:
                    log.write(_event(objective, progress, len(progress.epochs) - 1))
            bar(progress.step, _note(objective, progress, loss))
            if path is not None and time.monotonic() - saved > checkpoint_seconds:
                progress.log_bytes = log.bytes() if log is not None else 0
                keep()
                saved = time.monotonic()
        progress.log_bytes = log.bytes() if log is not None else 0
    history = [_event(objective, progress, epoch) for epoch in range(len(progress.epochs))]
    return Outcome(progress, best, history, keep)


def make_optimizer(objective: Objective) -> torch.optim.AdamW:
    """AdamW on the parameters; the schedule of a resumed run reads the peak rate from ``initial_lr``."""
    groups = [{**group, "initial_lr": group["lr"]} for group in objective.groups()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def step(objective: Objective, optimizer: torch.optim.Optimizer, number: int) -> float:
    """One step of the optimizer; returns its loss."""
    value = 0.0
    for term in objective.terms(number):
        loss = term()
        loss.backward()
        value += loss.item()
    nn.utils.clip_grad_norm_(objective.parameters.values(), objective.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value):
        raise _diverged(objective)
    return value


def _diverged(objective: Objective) -> MbertError:
    return objective.error(
        objective.title, "a loss or weights that are not finite", "finite ones", objective.if_diverged
    )


def _stopped(objective: Objective, progress: Progress) -> bool:
    return bool(progress.epochs) and len(progress.epochs) - 1 - progress.best_epoch >= objective.patience


def _end_epoch(objective: Objective, progress: Progress, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """Score the epoch; returns the best parameters so far."""
    start = time.monotonic()
    score = objective.score()
    if not math.isfinite(score) or not all(
        bool(parameter.isfinite().all()) for parameter in objective.parameters.values()
    ):
        raise _diverged(objective)
    progress.seconds += time.monotonic() - start
    progress.epochs.append(Epoch(sum(progress.losses) / len(progress.losses), score))
    progress.losses.clear()
    return objective.values() if progress.best_epoch == len(progress.epochs) - 1 else best


def _event(objective: Objective, progress: Progress, epoch: int) -> dict[str, Any]:
    """The log entry of an epoch."""
    result = progress.epochs[epoch]
    where = {"step": (epoch + 1) * objective.epoch, "epoch": epoch}
    return {**where, "train_loss": result.train_loss, objective.score_name: result.score}


def _note(objective: Objective, progress: Progress, loss: float) -> str:
    if progress.best_score is None:
        return f"loss {loss:.4f}"
    return f"{objective.score_name.replace('_', ' ')} {progress.best_score:.3f} (epoch {progress.best_epoch + 1})"
