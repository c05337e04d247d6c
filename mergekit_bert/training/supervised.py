"""Ordinary training as an Objective: the loss on labelled rows, and the task's metric on held-out ones."""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.attach import cast_frozen, dropout_on
from mergekit_bert.data.batches import Epochs, Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.forward import forward_rows, outputs_of, scaled
from mergekit_bert.errors import TrainingError
from mergekit_bert.hardware import autocast
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.log import RunLog
from mergekit_bert.training.loop import Outcome, minimise
from mergekit_bert.training.objective import Objective, Term
from mergekit_bert.training.trainable import Trainable


@dataclass(frozen=True)
class TrainingRun:
    """A training run: its rows, its options, its folder, and the description (``run``) that a checkpoint must match."""

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


def fit(work: Trainable, spec: TrainingRun) -> Outcome:
    """Train ``work``, from the checkpoint in the run's folder if there is one."""
    return minimise(
        Supervised(work, spec),
        spec.folder,
        spec.config.checkpoint_seconds,
        lambda at: RunLog(spec.folder, at.log_bytes, spec.tensorboard, at.step),
        spec.show,
    )


class Supervised(Objective):
    """The mean loss of a batch of labelled rows; the score is the task's main metric on the held-out rows."""

    error = TrainingError
    if_diverged = "use a smaller `lr` or `precision=fp32`"
    if_broken = "start over with `force`"

    def __init__(self, work: Trainable, spec: TrainingRun) -> None:
        """Cast frozen parameters to the run's precision; raises TrainingError for ``balance`` without labels."""
        cast_frozen(work.model, spec.dtype)
        config = spec.config
        self.work, self.spec = work, spec
        self.batches = Epochs(spec.train, config.batch_size, config.seed)
        self.device = next(work.model.parameters()).device
        self.label_weights = self._label_weights()
        self.title = f"training {spec.task.name}"
        self.parameters, self.generators = work.parameters, {"dropout": work.source}
        self.run, self.clip, self.patience = spec.run, config.clip, config.patience
        self.epoch = self.batches.steps
        self.steps = config.epochs * self.epoch
        self.warmup = round(config.warmup * self.steps)
        self.score_name = f"held_out_{spec.task.metric}"

    def terms(self, step: int) -> Iterator[Term]:
        """The loss on this step's rows, within the token budget."""
        dropout_on(self.work.model, True)
        index = self.batches.rows(step)
        for run in self.spec.train.cut(index):
            yield partial(self._loss, run, len(run) / len(index))

    def _loss(self, run: list[int], share: float) -> Float[Tensor, ""]:
        batch = self.spec.train.batch(run)
        assert batch.targets is not None
        with autocast(self.spec.dtype, self.device):
            outputs = outputs_of(self.work.model, batch)
        task = self.spec.task
        return kind_of(task).loss(task, outputs.float(), batch.targets.to(self.device), self.label_weights) * share

    def _label_weights(self) -> Float[Tensor, "_"] | None:
        """Weights of the labels in the loss, if ``balance`` is set; raises TrainingError for a task without labels."""
        if not self.spec.config.balance:
            return None
        task, labels = self.spec.task, self.spec.train.labels
        assert labels is not None
        weights = kind_of(task).weights(task, labels)
        if weights is None:
            found = f"{task.name!r}, which has no labels to balance"
            raise TrainingError("`balance`", found, "a task with labels", "drop `balance`")
        return weights.to(self.device)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups: adapter or encoder, and head, with their own rates; biases and norms are not decayed."""
        groups = []
        for is_head in (False, True):
            for decays in (True, False):
                chosen = [
                    parameter
                    for name, parameter in self.parameters.items()
                    if name.startswith("head.") == is_head and (parameter.dim() > 1) == decays
                ]
                groups.append(
                    {
                        "params": chosen,
                        "lr": self.spec.head_lr if is_head else self.spec.lr,
                        "weight_decay": self.spec.config.weight_decay if decays else 0.0,
                    }
                )
        return [group for group in groups if group["params"]]

    def score(self) -> float:
        """The task's main metric on the held-out rows."""
        dropout_on(self.work.model, False)
        task, held_out = self.spec.task, self.spec.held_out
        assert held_out.labels is not None
        outputs = scaled(forward_rows(self.work.model, held_out, self.spec.dtype), task)
        return metric(task.metric).value(
            kind_of(task).truth(task, held_out.labels), kind_of(task).predicted(task, outputs)
        )

    def continues(self, path: Path, run: Mapping[str, Any]) -> bool:
        """True; raises TrainingError for the checkpoint of another run, which is replaced only with ``force``."""
        check_same(path, run, self.run)
        return True


def check_same(path: Path, earlier: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise TrainingError naming what differs unless the run recorded in ``path`` is ``run``."""
    differences = []
    for key, now in run.items():
        was = earlier.get(key)
        pairs = {key: (was, now)}
        if isinstance(now, dict) and isinstance(was, dict):
            pairs = {f"{key}.{name}": (was.get(name), value) for name, value in now.items()}
        differ = [pair for pair in pairs.items() if pair[1][0] != pair[1][1]]
        differ.sort(key=lambda pair: (not pair[0].endswith(".name"), pair[0]))  # names first: they tell most
        differences += [
            f"{name} was {reprlib.repr(before)}, now {reprlib.repr(after)}" for name, (before, after) in differ
        ]
    if differences:
        raise TrainingError(
            str(path),
            f"another run ({', '.join(sorted(differences, key=len))})",  # shortest first: long messages are truncated
            "the same command as before",
            "repeat it, choose another `out`, or start over with `force`",
        )
