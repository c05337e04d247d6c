"""MergeInputs: what a merge is made of, whatever kind of file it came from."""

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
    """One input of a merge: its Deltas and shifts of the layers, and what each of its tasks keeps for itself.

    ``deltas`` and ``shifts`` may be read from a file one by one, on demand. ``identify`` gives the SHA-256 (hex) of
    what each task (or body) came from: an adapter, a checkpoint's folder, or a merge, of which it is taken over all
    that answers the task (two merges of the same adapters are two inputs). ``examples`` is how many rows it was
    trained on, ``basis`` its rows of an orthogonal basis, ``statistics`` what its file says of its inputs (kind, then
    site). ``bodies`` is the provenance of what came without a head, by name: it has no task. ``adapter`` is the adapter
    that it was made from, where it is one; ``trace`` what was learned and lost in the merge that it is, ``kept`` the
    inputs which that kept. ``encoder`` is its base, where it was opened to read the changes against it.
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
        """What it takes to answer ``task`` (one of its own)."""
        record, own = self.parts[task], self.own[task]
        found = Part(
            Task.from_json(record["task"]), int(record["max_length"]), own.deltas, own.shifts, own.head, own.extras
        )
        return found.over(Patch(self.deltas, self.shifts))

    def seen(self) -> Seen:
        """The rows whose labels the merge that it is has seen."""
        return seen_in(self.trace)


@functools.singledispatch
def inputs_of(
    model: Any, where: str = "the inputs", base: str | Encoder | None = None, load: Loader = load_encoder
) -> list[MergeInput]:
    """What a model gives to a merge: itself as one input, or of an ensemble each adapter.

    Adapters that need their base are put on it, ``base`` or the one that they name; ``where`` is what messages call
    the model. Raises ModelFileError or CompositionError.
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
    """An adapter's Deltas; what its head alone reads, and extras, which cannot be added up, are not merged."""
    deltas = adapter.deltas()
    own = TaskSpecific(
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
        own={adapter.name: own},
        parts={adapter.name: record},
        identify=lambda: {adapter.name: str(record["sha256"])},
        adapter=adapter,
        examples=examples if isinstance(examples, int) and examples > 0 else None,
        basis=adapter.basis,
        statistics=adapter.statistics,
    )


def of_merged(merged: Merged) -> MergeInput:
    """A merged model as one input, with all its tasks; it is known by their names."""
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
    """A SHA-256 for each Delta, and one for all shifts: no more than one Delta is looked at at a time."""
    return [
        *(tensor_file_sha256(vars(deltas[site]), {"site": site}) for site in sorted(deltas)),
        tensor_file_sha256(shifts, {}),
    ]


def _own_content(own: TaskSpecific) -> list[str]:
    extras = [tensor_file_sha256(tensors, {"extra": name}) for name, tensors in sorted(own.extras.items())]
    return [*_content(own.deltas, own.shifts), tensor_file_sha256(own.head, {}), *extras]


def check_together(merge_inputs: Sequence[MergeInput]) -> None:
    """Raise CompositionError unless the inputs have one base and different tasks, and at least one has a task."""
    if not merge_inputs:
        raise CompositionError("merge", "no adapters", "at least one", "name their files")
    if not any(one.parts for one in merge_inputs):
        raise CompositionError(
            "merge",
            f"no head in any of {', '.join(one.name for one in merge_inputs)}",
            "at least one input with a task",
            "train one with its head's modules in modules_to_save",
        )
    first = merge_inputs[0]
    seen: set[str] = set()
    for one in merge_inputs:
        where = f"adapters {first.name!r} and {one.name!r}"
        if one.base.fingerprint != first.base.fingerprint:
            raise CompositionError(
                where,
                f"different bases ({first.base.name} {first.base.fingerprint[:12]}, "
                f"{one.base.name} {one.base.fingerprint[:12]})",
                "adapters of one base",
                "train them on the same `base`",
            )
        if one.base.tokenizer_fingerprint != first.base.tokenizer_fingerprint:
            raise CompositionError(
                where, "different tokenizers", "adapters of one base and tokenizer", "train them on the same `base`"
            )
        for task in (*one.parts, *one.bodies):
            if task in seen:
                raise CompositionError(
                    f"{'task' if task in one.parts else 'adapter'} {task!r}",
                    "two adapters of it",
                    "one adapter a task",
                    "leave one out, or `remove` the task beside `add`",
                )
            seen.add(task)
