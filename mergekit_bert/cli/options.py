"""Options that several commands share, each told once. Imports nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

Task = Annotated[
    str, typer.Option(help="A built-in task (see `mbert tasks`) or a task's YAML file.", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder that holds <task>/{train,dev}.tsv (.csv, .jsonl, .parquet), or 'sample' for the generated corpus.",
        show_default="the folder data/, then the Hub",
    ),
]
Base = Annotated[str, typer.Option(help="The encoder: 'minilm' (embedded), a local folder, or a name on the Hub.")]
ModelBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The encoder, where it is not to be had under the name in the file.",
        show_default="the one in the file",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut short.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard files into the run's folder.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training rows at most; the best one is kept.")]
BatchSize = Annotated[int, typer.Option(help="Rows a step.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay; biases and norms are not decayed.")]
HeadDropout = Annotated[float, typer.Option(help="Dropout before the head.")]
MaxLength = Annotated[int, typer.Option(help="Longest text in tokens; longer ones are cut and counted.")]
HoldOut = Annotated[float, typer.Option(help="Share of the training rows that only choose the best epoch.")]
Patience = Annotated[int, typer.Option(help="Stop after so many epochs without a better one.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Precision = Annotated[str, typer.Option(help="auto (bf16 where a quick probe shows it is faster), fp32 or bf16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]
CheckpointSeconds = Annotated[float, typer.Option(help="Seconds of work that a kill may cost.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.", show_default="not")]
