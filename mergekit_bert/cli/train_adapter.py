"""``mbert train-adapter``: one small adapter for one task."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bert.adapters.config import RECORDS, USUAL, Options
from mergekit_bert.cli import options
from mergekit_bert.training.config import TrainConfig

EXAMPLE = "Example: mbert train-adapter --task sts --data DIR — writes adapters/sts.safetensors and scores it on dev."


@options.flags({"adapter": options.of_family}, adapter=RECORDS, train=TrainConfig)
def command(
    adapter: Options,
    train: TrainConfig,
    task: Annotated[
        list[str],
        typer.Option(
            help="A built-in task (see `mbert tasks`) or a task's YAML file. Repeat it to train several in turn.",
            show_default=False,
        ),
    ],
    data: options.Data = None,
    base: options.Base = "minilm",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="adapters/<task>.safetensors")] = None,
    kind: options.Family = USUAL,
    with_stats: Annotated[
        str,
        typer.Option(
            help="Statistics to store in the file, so that merges need no rows: gram, fisher, or gram,fisher.",
            show_default="none",
        ),
    ] = "",
    avoid: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --basis avoid: an adapter of another task that should not be disturbed; it must contain gram "
            "statistics. May be repeated.",
            show_default="none",
        ),
    ] = None,
    tensorboard: options.Tensorboard = False,
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Train an adapter (or, with --type probe, only a head) on a frozen encoder, and score it on the dev rows.

    The best epoch is chosen on rows held out from train; dev rows are used for the final score only. The adapter file
    is self-contained; the log and the manifest are written beside it, to <out>.run/.
    """
    from mergekit_bert import api
    from mergekit_bert.adapters.statistics import check_kinds
    from mergekit_bert.cli.report import after_training, check_dev
    from mergekit_bert.data.task import get_task
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.errors import TrainingError
    from mergekit_bert.hardware import set_threads
    from mergekit_bert.outputs import Output, claimed

    set_threads(train.threads)
    if out is not None and len(task) > 1:
        raise TrainingError("--out", f"one file for {len(task)} tasks", "one task, or no --out", "drop --out")
    if avoid and len(task) > 1:
        raise TrainingError("--avoid", f"{len(task)} tasks, which would collide", "one task", "train one by one")
    kinds = [part.strip() for part in with_stats.split(",") if part.strip()]
    check_kinds(kinds)
    tasks = [get_task(one) for one in task]
    paths = [out or api.default_out(one, kind) for one in tasks]
    for one in tasks:  # before any long work
        check_dev(one, data)
    with claimed(*(Output(path, force or resume) for path in paths)):
        encoder = load_encoder(base)
        for one, path in zip(tasks, paths, strict=True):
            trained = api.train_adapter(
                one,
                data,
                path,
                base=encoder,
                type=kind,
                adapter=adapter,
                train=train,
                resume=resume,
                force=force,
                tensorboard=tensorboard,
                progress=True,
                with_stats=kinds,
                avoid=avoid or (),
            )
            after_training(one, path, data, encoder, trained)
