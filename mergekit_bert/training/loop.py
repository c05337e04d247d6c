"""The one training loop: AdamW, warm-up and linear decay, the best epoch by held-out rows, early stopping, resume.

It knows nothing of adapters: it moves named parameters of a model. Everything it does is a function of its inputs and
of ``Progress``, so that a killed run ends in the same bits.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.attach import cast_frozen, dropout_on
from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metrics import metric
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.forward import forward_rows, outputs_of, scaled
from mergekit_bert.errors import TrainingError
from mergekit_bert.hardware import autocast
from mergekit_bert.progress import progress_bar
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.log import RunLog
from mergekit_bert.training.resume import CHECKPOINT, Progress, load_checkpoint, save_checkpoint
from mergekit_bert.training.trainable import Trainable

_LOG_EVERY = 10


@dataclass(frozen=True)
class Setting:
    """One run: its rows, its options, its folder, and the description that a checkpoint must match."""

    task: Task
    train: Tokens
    held_out: Tokens
    config: TrainConfig
    lr: float
    head_lr: float
    dtype: torch.dtype
    folder: Path
    run: dict[str, Any]
    tensorboard: bool = False
    show: bool = True

    @cached_property
    def loss_weights(self) -> Float[Tensor, "outputs"] | None:
        """Weights of the labels in the loss, where they are to be balanced; raises TrainingError for values."""
        if not self.config.balance:
            return None
        assert self.train.labels is not None
        weights = kind_of(self.task).weights(self.task, self.train.labels)
        if weights is None:
            found = f"{self.task.name!r}, which has no labels to balance"
            raise TrainingError("`balance`", found, "a task with labels", "drop `balance`")
        return weights


@dataclass(frozen=True)
class Outcome:
    """What the loop found: the best epoch's parameters, and how it went; ``keep`` writes its last checkpoint."""

    best: dict[str, Tensor]
    progress: Progress
    keep: Callable[[], None]


def fit(work: Trainable, setting: Setting) -> Outcome:
    """Train ``work``; goes on from a checkpoint in the run's folder where there is one."""
    optimizer = make_optimizer(work, setting)
    progress, best = Progress(), dict[str, Tensor]()
    batches = math.ceil(len(setting.train) / setting.config.batch_size)
    if (setting.folder / CHECKPOINT).exists():
        progress, best = load_checkpoint(setting.folder, setting.run, work, optimizer, batches)
    log = RunLog(setting.folder, progress.log_bytes, setting.tensorboard, progress.step)
    total = setting.config.epochs * batches

    def keep() -> None:
        save_checkpoint(setting.folder, setting.run, progress, work, optimizer, best)

    saved = time.monotonic()
    try:
        with progress_bar(f"train {setting.task.name}", total, setting.show) as bar:
            for _ in _steps(work, optimizer, setting, progress, total, log):
                if progress.batch == 0:  # an epoch has ended
                    best = _end_epoch(work, setting, progress, best, log)
                bar(progress.step, _note(setting.task, progress))
                if time.monotonic() - saved > setting.config.checkpoint_seconds:
                    progress.log_bytes = log.bytes()
                    keep()
                    saved = time.monotonic()
        progress.log_bytes = log.bytes()
    finally:
        log.close()
    return Outcome(best, progress, keep)


def make_optimizer(work: Trainable, setting: Setting) -> torch.optim.AdamW:
    """AdamW on the trained parameters; what is frozen is cast to the run's precision."""
    cast_frozen(work.model, setting.dtype)
    groups = []
    for is_head in (False, True):
        for decays in (True, False):  # biases and norms are not decayed
            chosen = [
                p
                for name, p in work.parameters.items()
                if name.startswith("head.") == is_head and (p.dim() > 1) == decays
            ]
            groups.append(
                {
                    "params": chosen,
                    "peak": setting.head_lr if is_head else setting.lr,
                    "weight_decay": setting.config.weight_decay if decays else 0.0,
                }
            )
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _steps(
    work: Trainable, optimizer: torch.optim.AdamW, setting: Setting, progress: Progress, total: int, log: RunLog
) -> Iterator[None]:
    """Run the steps that are left, yielding after each; ``progress`` tells where it stands."""
    config = setting.config
    while progress.epoch < config.epochs and not _stopped(progress, config.patience):
        batches = setting.train.shuffled(config.batch_size, config.seed, progress.epoch)
        while progress.batch < len(batches):
            start = time.monotonic()
            rate = _rate(progress.step, total, round(config.warmup * total))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            loss = step(work, optimizer, setting, batches[progress.batch])
            progress.batch, progress.step = progress.batch + 1, progress.step + 1
            progress.loss_sum += loss
            progress.seconds += time.monotonic() - start
            if progress.step % _LOG_EVERY == 0:
                log.write(
                    {
                        "step": progress.step,
                        "epoch": progress.epoch,
                        "loss": loss,
                        "lr": rate * setting.lr,
                        "seconds": round(progress.seconds, 3),
                    }
                )
            if progress.batch < len(batches):
                yield
        progress.epoch, progress.batch = progress.epoch + 1, 0
        yield


def _stopped(progress: Progress, patience: int) -> bool:
    return progress.epoch - 1 - progress.best_epoch >= patience and progress.epoch > 0


def _rate(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate: linear up over ``warmup`` steps, linear down to zero at ``total``."""
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def step(work: Trainable, optimizer: torch.optim.AdamW, setting: Setting, index: list[int]) -> float:
    """One step of the optimizer on the rows at ``index``, forward and backward within the token budget."""
    device = next(work.model.parameters()).device
    dropout_on(work.model, True)
    weights = setting.loss_weights.to(device) if setting.loss_weights is not None else None
    value = 0.0
    for run in setting.train.cut(index):
        batch = setting.train.batch(run)
        assert batch.targets is not None
        with autocast(setting.dtype, device):
            outputs = outputs_of(work.model, batch)
        loss = kind_of(setting.task).loss(outputs.float(), batch.targets.to(device), weights) * (len(run) / len(index))
        loss.backward()
        value += loss.item()
    nn.utils.clip_grad_norm_(work.parameters.values(), setting.config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value):
        raise _diverged(setting.task)
    return value


def _diverged(task: Task) -> TrainingError:
    return TrainingError(
        f"training {task.name}",
        "a loss or weights that are not finite",
        "finite ones",
        "use a smaller `lr` or `precision=fp32`",
    )


def _end_epoch(
    work: Trainable, setting: Setting, progress: Progress, best: dict[str, Tensor], log: RunLog
) -> dict[str, Tensor]:
    """Score the held-out rows; returns the best parameters so far."""
    start = time.monotonic()
    score = held_out_score(work, setting)
    if not math.isfinite(score) or not all(bool(p.isfinite().all()) for p in work.parameters.values()):
        raise _diverged(setting.task)
    progress.seconds += time.monotonic() - start
    steps = math.ceil(len(setting.train) / setting.config.batch_size)
    event = {
        "step": progress.step,
        "epoch": progress.epoch - 1,
        "train_loss": progress.loss_sum / steps,
        f"held_out_{setting.task.metric}": score,
    }
    progress.history.append(event)
    progress.loss_sum = 0.0
    log.write(event)
    if progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_epoch = score, progress.epoch - 1
        return work.values()
    return best


def held_out_score(work: Trainable, setting: Setting) -> float:
    """The task's main metric on the held-out rows."""
    dropout_on(work.model, False)
    task, labels = setting.task, setting.held_out.labels
    assert labels is not None
    outputs = scaled(forward_rows(work.model, setting.held_out, setting.dtype), task)
    return metric(task.metric).value(kind_of(task).truth(labels), kind_of(task).predicted(task, outputs))


def _note(task: Task, progress: Progress) -> str:
    if progress.best_score is None:
        return ""
    return f"held-out {task.metric} {progress.best_score:.3f} (epoch {progress.best_epoch + 1})"
