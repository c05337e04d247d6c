"""``mbert finetune``: the full fine-tuning reference."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.training.config import FULL_RATES, TrainConfig

EXAMPLE = (
    "Example: mbert finetune --task sts --data DIR — writes the Hugging Face folder models/sts and scores it on dev."
)


def command(
    task: options.Task,
    data: options.Data = None,
    base: options.Base = "minilm",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="models/<task>")] = None,
    epochs: options.Epochs = TrainConfig.epochs,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=f"{FULL_RATES[0]:g}")
    ] = TrainConfig.lr,
    head_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the head.", show_default=f"{FULL_RATES[1]:g}")
    ] = TrainConfig.head_lr,
    warmup: options.Warmup = TrainConfig.warmup,
    weight_decay: options.WeightDecay = TrainConfig.weight_decay,
    head_dropout: options.HeadDropout = TrainConfig.head_dropout,
    max_length: options.MaxLength = TrainConfig.max_length,
    hold_out: options.HoldOut = TrainConfig.hold_out,
    patience: options.Patience = TrainConfig.patience,
    seed: options.Seed = TrainConfig.seed,
    precision: options.Precision = TrainConfig.precision,
    threads: options.Threads = TrainConfig.threads,
    checkpoint_seconds: options.CheckpointSeconds = TrainConfig.checkpoint_seconds,
    tensorboard: options.Tensorboard = False,
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Fine-tune the whole encoder for one task: what adapters and merges are measured against."""
    train = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        head_lr=head_lr,
        warmup=warmup,
        weight_decay=weight_decay,
        head_dropout=head_dropout,
        max_length=max_length,
        hold_out=hold_out,
        patience=patience,
        seed=seed,
        precision=precision,
        threads=threads,
        checkpoint_seconds=checkpoint_seconds,
    )

    from mergekit_bert import api
    from mergekit_bert.cli.report import after_training
    from mergekit_bert.data.task import get_task
    from mergekit_bert.hardware import set_threads

    set_threads(threads)
    found = get_task(task)
    path = out or api.MODELS / found.name
    api.finetune(
        found, data, path, base=base, train=train, resume=resume, force=force, tensorboard=tensorboard, progress=True
    )
    after_training(found, path, data)
