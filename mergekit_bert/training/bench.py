"""Training speed of this machine: tokens per second by precision and batch size, and the estimated time of a run."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mergekit_bert.adapters import patch
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.family import Family
from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.head import HEADS
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.hardware import default_device, pick_precision
from mergekit_bert.training.config import ADAPTER_RATES, TrainConfig
from mergekit_bert.training.loop import make_optimizer, step
from mergekit_bert.training.supervised import Supervised, TrainingRun
from mergekit_bert.training.trainable import adapter_trainable, sites_of, virtual_of

BATCH_SIZES = (8, 16, 32, 64)
_STEPS = 6
_EVAL_SHARE = 0.5
"""A forward pass has 2 of the 4 operations a weight and token of a step over a frozen encoder."""


@dataclass(frozen=True)
class Speed:
    """The speed with one precision and batch size: ``tokens_per_second`` is the median over some steps."""

    precision: str
    batch_size: int
    tokens_per_second: float


def measure(
    encoder: Encoder,
    task: Task,
    tokens: Tokens,
    family: Family,
    adapter: Options,
    train: TrainConfig,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Speed]:
    """Train an adapter of ``family`` for a few steps in every precision and batch size; nothing is kept."""
    sites, found = sites_of(encoder, family, adapter, HEADS.get(train.head)), list[Speed]()
    basis = BasisRows(0, 0, adapter.rank) if adapter.basis != "random" else None
    for precision, size in itertools.product(("fp32", "bf16"), BATCH_SIZES):
        config = dataclasses.replace(train, precision=precision, batch_size=size)
        dtype = pick_precision(precision, default_device())
        work = adapter_trainable(encoder, task, family.name, adapter, sites, basis, config)
        objective = Supervised(work, TrainingRun(task, tokens, tokens, config, *ADAPTER_RATES, dtype, Path(), {}))
        optimizer, rates = make_optimizer(objective), []
        for number in range(_STEPS + 1):
            index, start = objective.batches.rows(number), time.perf_counter()
            step(objective, optimizer, number)
            rates.append(sum(map(tokens.length, index)) / (time.perf_counter() - start))
        found.append(Speed(precision, size, median(rates[1:])))  # the first step is to warm up
        tick(len(found))
    return found


def tokens_of(encoder: Encoder, task: Task, rows: Rows, family: Family, adapter: Options, train: TrainConfig) -> Tokens:
    """The rows as training sees them."""
    length, virtual = min(train.max_length, encoder.max_length), virtual_of(encoder, family, adapter)
    return patch.tokens_of(encoder, task, rows, HEADS.get(train.head), length, virtual)


def seconds_of_run(tokens: Tokens, train: TrainConfig, speeds: Sequence[Speed], precision: str) -> float:
    """About how long ``train`` takes on ``tokens``: all epochs, and the held-out rows after each."""
    near = min(
        (one for one in speeds if one.precision == precision),
        key=lambda one: abs(math.log(one.batch_size / train.batch_size)),
    )
    total = sum(tokens.length(row) for row in range(len(tokens)))
    held = min(round(len(tokens) * train.hold_out), train.hold_out_limit) / len(tokens)
    work = (1 - held) + held * _EVAL_SHARE
    return train.epochs * work * total / near.tokens_per_second
