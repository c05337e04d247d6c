"""``mbert train-adapter``: one small adapter for one task."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.cli import options
from mergekit_bert.registry import names_in
from mergekit_bert.training.config import TrainConfig

EXAMPLE = "Example: mbert train-adapter --task sts --data DIR — writes adapters/sts.safetensors and scores it on dev."
TYPES = ", ".join(names_in("mergekit_bert.adapters.types"))


@options.flags(adapter=AdapterConfig, train=TrainConfig)
def command(
    adapter: AdapterConfig,
    train: TrainConfig,
    task: options.Task,
    data: options.Data = None,
    base: options.Base = "minilm",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="adapters/<task>.safetensors")] = None,
    kind: Annotated[str, typer.Option("--type", help=f"Adapter type: {TYPES}.")] = "lora",
    tensorboard: options.Tensorboard = False,
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Train an adapter (or, with --type probe, a head alone) on a frozen encoder, and score it on the dev rows.

    The best epoch is chosen by rows held out from train; dev is only reported. The file is whole in itself; the log and
    the manifest lie beside it in <out>.run/.
    """
    from mergekit_bert import api
    from mergekit_bert.cli.report import after_training, check_dev
    from mergekit_bert.data.task import get_task
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.hardware import set_threads

    set_threads(train.threads)
    found = get_task(task)
    path = out or api.default_out(found, kind)
    check_dev(found, data)
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
