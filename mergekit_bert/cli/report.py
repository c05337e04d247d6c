"""What a training command prints when it ends."""

from pathlib import Path

from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.data.source import has_rows, load_rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.terminal import say
from mergekit_bert.training.manifest import read_manifest


def check_dev(task: Task, data: str | None) -> None:
    """Read the dev rows, if there are any, so that a bad line is reported before training and not after."""
    if has_rows(task, "dev", data):
        load_rows(task, "dev", data)


def after_training(
    task: Task, path: Path, data: str | None, encoder: Encoder | None = None, adapter: Adapter | None = None
) -> None:
    """Print a summary of the run and the basis rows of ``adapter``, and score the model on any dev rows."""
    manifest, held = read_manifest(path, task.metric)
    parameters, training = manifest.parameters, manifest.training
    say(
        f"wrote {path}: {training.examples} rows, best epoch {training.best_epoch} of {training.epochs} "
        f"(held-out {task.metric} {held:.3f}), {manifest.wall_seconds:.0f} s in {training.precision}"
    )
    share = f" ({100 - parameters.reduction_percent:.2f} %)" if parameters.reduction_percent else ""
    say(
        f"trained {parameters.trainable:,} of {parameters.total:,} parameters{share}, "
        f"peak memory {manifest.peak_memory_bytes / 2**20:.0f} MiB"
    )
    if adapter is not None and (basis := adapter.basis):
        width = min(in_features for _, in_features in adapter.sites.values())
        left = Ledger(path.parent).capacity_left(adapter.base.fingerprint, basis.count, width)
        last = basis.start + basis.count - 1
        say(f"basis rows {basis.start} to {last}; {left} more adapters of this rank fit into {path.parent}")
    if has_rows(task, "dev", data):
        for score in api.evaluate(path, data, base=encoder, tasks=[task]).scores:
            say(f"dev {score.metric} {score.value:.3f} ({score.ci_low:.3f} to {score.ci_high:.3f}, {score.n} rows)")
    else:
        say(f"not scored: there are no dev rows for {task.name}")
