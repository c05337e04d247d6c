"""Merge inputs: the form in which models of any format enter a merge."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.base import Loader, on_base
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.patch import Part, Patch, TaskSpecific
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Base, Encoder, load_encoder
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import fingerprint
from mergekit_bert.models.composition import Ensemble, Merged, Seen, seen_in
from mergekit_bert.tensorfile import tensor_file_sha256


@dataclass(frozen=True)
class MergeInput:
    """One input of a merge: Deltas and bias and norm updates of the layers, and task-specific parameters.

    ``deltas`` and ``shifts`` may be read from a file on demand. ``identify`` returns the SHA-256 (hex) of the source of
    each task or body: an adapter, a checkpoint's folder, or, for a merged model, all parameters used for the task (so
    two merges of the same adapters are different inputs). ``examples`` is the number of training rows, ``basis`` its
    rows of an orthogonal basis, ``statistics`` those in its file, by statistic and site. ``bodies`` is the provenance
    of adapters without a head, by name; they have no task. ``adapter`` is the adapter, if the input is one; ``trace``
    and ``kept`` are those of a merged model. ``encoder`` is its base, if that was opened to compute the changes.
    """

    name: str
    base: Base
    deltas: Mapping[str, Delta]
    shifts: Tensors
    own: Mapping[str, TaskSpecific]
    parts: Mapping[str, Mapping[str, Any]]
    identify: Callable[[], dict[str, str]]
    examples: int | None = None
    basis: BasisRows | None = None
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapter: Adapter | None = None
    trace: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Adapter] = field(default_factory=dict)
    encoder: Encoder | None = None

    @property
    def lazy(self) -> bool:
        """Whether its Deltas are read from a file whenever they are asked for."""
        return Patch(self.deltas).lazy

    def part(self, task: str) -> Part:
        """Everything needed to predict ``task``: shared and task-specific parameters."""
        record, specific = self.parts[task], self.own[task]
        part = Part(
            Task.from_json(record["task"]),
            int(record["max_length"]),
            specific.deltas,
            specific.shifts,
            specific.head,
            specific.extras,
        )
        return part.over(Patch(self.deltas, self.shifts))

    def seen(self) -> Seen:
        """The rows whose labels were read by steps after a merge, if the input is a merged model."""
        return seen_in(self.trace)


@functools.singledispatch
def inputs_of(
    model: Any, where: str = "the inputs", base: str | Encoder | None = None, load: Loader = load_encoder
) -> list[MergeInput]:
    """A model as merge inputs: one input, or for an ensemble one per adapter.

    Adapters that need their base are put on it (``base``, or the recorded one); ``where`` is the model's name in
    messages. Raises ModelFileError or CompositionError.
    """
    raise NotImplementedError(type(model).__name__)


@inputs_of.register
def _(model: MergeInput, *_: Any) -> list[MergeInput]:
    return [model]


@inputs_of.register
def _(model: Adapter, where: str = "the inputs", base: str | Encoder | None = None, *_: Any) -> list[MergeInput]:
    return [of_adapter(on_base(where, model, base))]


@inputs_of.register
def _(model: Merged, where: str = "the inputs", base: str | Encoder | None = None, *_: Any) -> list[MergeInput]:
    return [of_merged(on_base(where, model, base))]


@inputs_of.register
def _(model: Ensemble, where: str = "the inputs", base: str | Encoder | None = None, *_: Any) -> list[MergeInput]:
    return [of_adapter(on_base(where, expert, base)) for expert in model.experts.values()]


def of_adapter(adapter: Adapter) -> MergeInput:
    """An adapter as a merge input; its extras, and changes that only its head reads (a pooler), are task-specific."""
    deltas = adapter.deltas()
    specific = TaskSpecific(
        adapter.head,
        {site: delta for site, delta in deltas.items() if of_the_head(site)},
        {name: shift for name, shift in adapter.shifts.items() if of_the_head(name)},
        adapter.extras,
    )
    examples, record = adapter.training.get("examples"), adapter.provenance()
    return MergeInput(
        name=adapter.name,
        base=adapter.base,
        deltas={site: delta for site, delta in deltas.items() if not of_the_head(site)},
        shifts={name: shift for name, shift in adapter.shifts.items() if not of_the_head(name)},
        own={adapter.name: specific},
        parts={adapter.name: record},
        identify=lambda: {adapter.name: str(record["sha256"])},
        adapter=adapter,
        examples=examples if isinstance(examples, int) and examples > 0 else None,
        basis=adapter.basis,
        statistics=adapter.statistics,
    )


def of_merged(merged: Merged) -> MergeInput:
    """A merged model as one input with all its tasks, named after them."""
    counts = [part["training"].get("examples") for part in merged.parts.values()]
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return MergeInput(
        name="+".join(merged.parts),
        base=merged.base,
        deltas=merged.deltas,
        shifts=merged.shifts,
        own=merged.own,
        parts=merged.parts,
        identify=partial(_contents_of, merged),
        trace=merged.trace,
        kept=merged.kept,
        examples=sum(known) if len(known) == len(counts) else None,
        bodies=merged.bodies,
    )


def _contents_of(merged: Merged) -> dict[str, str]:
    shared = _content(merged.deltas, merged.shifts)
    return {task: fingerprint([shared, _own_content(merged.own[task]), part]) for task, part in merged.parts.items()}


def _content(deltas: Mapping[str, Delta], shifts: Tensors) -> list[str]:
    """A SHA-256 for each Delta, and one for all shifts; only one Delta is in memory at a time."""
    return [
        *(tensor_file_sha256(vars(deltas[site]), {"site": site}) for site in sorted(deltas)),
        tensor_file_sha256(shifts, {}),
    ]


def _own_content(specific: TaskSpecific) -> list[str]:
    extras = [tensor_file_sha256(tensors, {"extra": name}) for name, tensors in sorted(specific.extras.items())]
    return [*_content(specific.deltas, specific.shifts), tensor_file_sha256(specific.head, {}), *extras]


def check_together(merge_inputs: Sequence[MergeInput]) -> None:
    """Raise CompositionError unless the inputs have one base and different tasks, and at least one has a task."""
    if not merge_inputs:
        raise CompositionError("merge", "no adapters", "at least one", "name their files")
    if not any(merge_input.parts for merge_input in merge_inputs):
        raise CompositionError(
            "merge",
            f"no head in any of {', '.join(merge_input.name for merge_input in merge_inputs)}",
            "at least one input with a task",
            "train one with its head's modules in modules_to_save",
        )
    first = merge_inputs[0]
    seen: set[str] = set()
    for merge_input in merge_inputs:
        where = f"adapters {first.name!r} and {merge_input.name!r}"
        if merge_input.base.fingerprint != first.base.fingerprint:
            raise CompositionError(
                where,
                f"different bases ({first.base.name} {first.base.fingerprint[:12]}, "
                f"{merge_input.base.name} {merge_input.base.fingerprint[:12]})",
                "adapters of one base",
                "train them on the same `base`",
            )
        if merge_input.base.tokenizer_fingerprint != first.base.tokenizer_fingerprint:
            raise CompositionError(
                where, "different tokenizers", "adapters of one base and tokenizer", "train them on the same `base`"
            )
        for task in (*merge_input.parts, *merge_input.bodies):
            if task in seen:
                raise CompositionError(
                    f"{'task' if task in merge_input.parts else 'adapter'} {task!r}",
                    "two adapters of it",
                    "one adapter per task",
                    "leave one out, or `remove` the task beside `add`",
                )
            seen.add(task)
