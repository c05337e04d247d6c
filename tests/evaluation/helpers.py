"""What several tests of evaluations use."""

import dataclasses
from pathlib import Path
from typing import Any

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing.method import Method
from mergekit_bert.composing.methods import ties
from mergekit_bert.evaluation.method_comparison import MethodComparison

SOME = ["fedavg", "ties", "regmean"]


def run(three: list[Adapter], bert: mb.Encoder, data: Path, out: Path, **options: Any) -> MethodComparison:
    """The comparison of some methods."""
    return api.compare(three, SOME, data=data, rows=6, out=out, base=bert, **options)


def other_ties() -> Method:
    """TIES, had it another density where none is given."""
    usual = ties.RECORD.options

    @dataclasses.dataclass(frozen=True)
    class Other(usual):  # type: ignore[misc, valid-type]
        density: float = dataclasses.field(
            default=usual().density / 3, metadata=usual.__dataclass_fields__["density"].metadata
        )

    return dataclasses.replace(ties.RECORD, options=Other)


def seen(model: mb.Merged) -> dict[tuple[str, str], frozenset[str]]:
    """The hashes of the rows whose labels the model has seen, by step and task."""
    return {(step, task): hashes for step, task, _, hashes in model.seen()}
