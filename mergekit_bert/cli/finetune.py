"""``mbert finetune``: the full fine-tuning reference."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.cli import options
from mergekit_bert.training.config import TrainConfig

EXAMPLE = (
    "Example: mbert finetune --task sts --data DIR — writes the Hugging Face folder models/sts and scores it on dev."
)


@options.flags(train=TrainConfig)
def command(
    train: TrainConfig,
    task: options.Task,
    data: options.Data = None,
    base: options.Base = "minilm",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="models/<task>")] = None,
    tensorboard: options.Tensorboard = False,
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Fine-tune the whole encoder for one task, as the reference for adapters and merges."""
    from mergekit_bert import api
    from mergekit_bert.cli.report import after_training, check_dev
    from mergekit_bert.data.task import get_task
    from mergekit_bert.encoder.folder import FILES
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import Output, claimed

    set_threads(train.threads)
    found = get_task(task)
    path = out or api.MODELS / found.name
    check_dev(found, data)
    with claimed(Output(path, force or resume, FILES)):
        api.finetune(
            found,
            data,
            path,
            base=base,
            train=train,
            resume=resume,
            force=force,
            tensorboard=tensorboard,
            progress=True,
        )
        after_training(found, path, data)
