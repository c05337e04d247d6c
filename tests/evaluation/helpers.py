"""What several tests of evaluations use."""

from pathlib import Path
from typing import Any

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.evaluation import contest

SOME = ["fedavg", "ties", "regmean"]


def run(three: list[Adapter], bert: mb.Encoder, data: Path, out: Path, **options: Any) -> contest.Contest:
    """The contest of some methods."""
    return api.compare(three, SOME, data=data, rows=6, out=out, base=bert, **options)


def seen(model: mb.Merged) -> dict[tuple[str, str], frozenset[str]]:
    """The hashes of the rows whose labels the model has seen, by step and task."""
    return {(step, task): hashes for step, task, _, hashes in model.seen()}
