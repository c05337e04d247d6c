"""``mbert train-adapter``: one small adapter for one task."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.cli import options
from mergekit_bert.registry import names_in
from mergekit_bert.training.config import ADAPTER_RATES, TrainConfig

EXAMPLE = "Example: mbert train-adapter --task sts --data DIR — writes adapters/sts.safetensors and scores it on dev."
TYPES = ", ".join(names_in("mergekit_bert.adapters.types"))


def command(
    task: options.Task,
    data: options.Data = None,
    base: options.Base = "minilm",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="adapters/<task>.safetensors")] = None,
    kind: Annotated[str, typer.Option("--type", help=f"Adapter type: {TYPES}.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of each site's Delta.")] = AdapterConfig.rank,
    alpha: Annotated[float, typer.Option(help="The Delta is (alpha / rank) · B @ A.")] = AdapterConfig.alpha,
    rank_stabilized: Annotated[
        bool, typer.Option("--rank-stabilized", help="Scale by alpha / √rank (rsLoRA).")
    ] = AdapterConfig.rank_stabilized,
    dropout: Annotated[float, typer.Option(help="Dropout before the adapter.")] = AdapterConfig.dropout,
    targets: Annotated[
        str, typer.Option(help="Sites: qv, qkv, attention, all-linear, or a pattern of whole layer names.")
    ] = AdapterConfig.targets,
    basis: Annotated[
        str, typer.Option(help="orthogonal (frozen A, for orthoada) or random (ordinary LoRA).")
    ] = AdapterConfig.basis,
    train_bias: Annotated[bool, typer.Option("--train-bias", help="Also train the biases.")] = False,
    train_layernorm: Annotated[bool, typer.Option("--train-layernorm", help="Also train the LayerNorms.")] = False,
    epochs: options.Epochs = TrainConfig.epochs,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default=f"{ADAPTER_RATES[0]:g} unless the type needs another"),
    ] = TrainConfig.lr,
    head_lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the head.", show_default=f"{ADAPTER_RATES[1]:g} unless the type needs another"
        ),
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
    """Train an adapter (or, with --type probe, a head alone) on a frozen encoder, and score it on the dev rows.

    The best epoch is chosen by rows held out from train; dev is only reported. The file is whole in itself; the log and
    the manifest lie beside it in <out>.run/.
    """
    adapter = AdapterConfig(
        rank=rank,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        dropout=dropout,
        targets=targets,
        basis=basis,
        train_bias=train_bias,
        train_layernorm=train_layernorm,
    )
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
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.hardware import set_threads

    set_threads(threads)
    found = get_task(task)
    path = out or api.default_out(found, kind)
    encoder = load_encoder(base)
    api.train_adapter(
        found,
        data,
        path,
        base=encoder,
        kind=kind,
        adapter=adapter,
        train=train,
        resume=resume,
        force=force,
        tensorboard=tensorboard,
        progress=True,
    )
    after_training(found, path, data, encoder)
