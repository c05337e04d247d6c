"""``mbert bench``: how fast this machine trains, and how long a run will take."""

from typing import Annotated

import typer

from mergekit_bert.adapters.config import RECORDS, USUAL, Options
from mergekit_bert.cli import options
from mergekit_bert.training.config import TrainConfig

EXAMPLE = "Example: mbert bench --task sst --data DIR — or mbert bench alone, on the generated corpus."


@options.flags({"adapter": options.of_family}, adapter=RECORDS, train=TrainConfig)
def command(
    adapter: Options,
    train: TrainConfig,
    task: Annotated[str, typer.Option(help="A built-in task (see `mbert tasks`) or a task's YAML file.")] = "sst",
    data: Annotated[str, typer.Option(help="Folder that holds <task>/train.tsv, or 'sample'.")] = "sample",
    base: options.Base = "minilm",
    kind: options.Family = USUAL,
) -> None:
    """Measure training speed by precision and batch size, report the fastest setting, and estimate the time of a run.

    It trains an adapter for a few steps with every setting and keeps nothing. The other options are those of
    train-adapter; the estimate is for a run with these options.
    """
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mergekit_bert.adapters.family import FAMILIES
    from mergekit_bert.data.source import load_rows
    from mergekit_bert.data.task import get_task
    from mergekit_bert.encoder.load import load_encoder
    from mergekit_bert.hardware import default_device, matrix_rate, pick_precision, set_threads, threads
    from mergekit_bert.progress import progress_bar
    from mergekit_bert.terminal import say, show
    from mergekit_bert.training.bench import BATCH_SIZES, measure, seconds_of_run, tokens_of

    set_threads(train.threads)
    found, family, device = get_task(task), FAMILIES.get(kind), default_device()
    encoder = load_encoder(base)
    tokens = tokens_of(encoder, found, load_rows(found, "train", data), family, adapter, train)
    rates = {name: matrix_rate(dtype, device) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    with progress_bar("bench", 2 * len(BATCH_SIZES), show=True) as bar:
        speeds = measure(encoder, found, tokens, family, adapter, train, bar)
    table = Table("precision", *(f"{size} rows a step" for size in BATCH_SIZES), box=SIMPLE_HEAD)
    for precision in rates:
        own = [one.tokens_per_second for one in speeds if one.precision == precision]
        table.add_row(precision, *(f"{rate:,.0f}" for rate in own))
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    say(f"{device}, {threads()} CPU threads; matrix products, GFLOP/s: {products}")
    say(f"training an adapter for {found.name}, tokens a second:")
    show(table)
    picked = {torch.float32: "fp32", torch.bfloat16: "bf16"}[pick_precision(train.precision, device)]
    best = max(speeds, key=lambda one: one.tokens_per_second)
    seconds = seconds_of_run(tokens, train, speeds, picked)
    say(f"--precision {train.precision} means {picked} here; the fastest is {best.precision}, {best.batch_size} rows")
    say(
        f"a run on {len(tokens)} rows, {train.epochs} epochs of {train.batch_size} rows a step in {picked}: "
        f"about {seconds:.0f} s, and the score on dev"
    )
