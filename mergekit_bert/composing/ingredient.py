"""Ingredients: what a merge is made of, whatever kind of file it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_bert.adapters.adapter import Adapter, Base, Tensors
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.file import provenance
from mergekit_bert.composing.composition import Merged, Own
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import file_fingerprint, fingerprint
from mergekit_bert.tensorfile import tensor_file_sha256


@dataclass(frozen=True)
class Ingredient:
    """One input of a merge: its Deltas and shifts of the layers, and what each of its tasks keeps for itself.

    ``deltas`` and ``shifts`` may be read from a file one by one, on demand. ``examples`` is how many rows it was
    trained on, ``basis`` its rows of an orthogonal basis, ``statistics`` what its file says of its inputs (kind, then
    site). ``model`` is what it was made from. ``bodies`` is the provenance of what came without a head, by name: it has
    no task.
    """

    name: str
    base: Base
    deltas: Mapping[str, Delta]
    shifts: Tensors
    own: Mapping[str, Own]
    parts: Mapping[str, Mapping[str, Any]]
    model: Any
    examples: int | None = None
    basis: BasisRows | None = None
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def of_adapter(adapter: Adapter) -> Ingredient:
    """An adapter's Deltas; what its head alone reads is not merged."""
    deltas = adapter.deltas()
    own = Own(
        adapter.head,
        {site: delta for site, delta in deltas.items() if of_the_head(site)},
        {name: shift for name, shift in adapter.shifts.items() if of_the_head(name)},
    )
    examples = adapter.training.get("examples")
    return Ingredient(
        name=adapter.name,
        base=adapter.base,
        deltas={site: delta for site, delta in deltas.items() if not of_the_head(site)},
        shifts={name: shift for name, shift in adapter.shifts.items() if not of_the_head(name)},
        own={adapter.name: own},
        parts={adapter.name: provenance(adapter)},
        model=adapter,
        examples=examples if isinstance(examples, int) and examples > 0 else None,
        basis=adapter.basis,
        statistics=adapter.statistics,
    )


def of_merged(merged: Merged) -> Ingredient:
    """A merged model as one input, with all its tasks; it is known by their names."""
    counts = [part["training"].get("examples") for part in merged.parts.values()]
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return Ingredient(
        name="+".join(merged.parts),
        base=merged.base,
        deltas=merged.deltas,
        shifts=merged.shifts,
        own=merged.own,
        parts=merged.parts,
        model=merged,
        examples=sum(known) if len(known) == len(counts) else None,
        bodies=merged.bodies,
    )


def identity(one: Ingredient) -> dict[str, str]:
    """SHA-256 (hex) of what each task (or body) of ``one`` came from: an adapter, a checkpoint's folder, or a merge.

    Of a merge it is taken over all that answers the task: two merges of the same adapters are two inputs.
    """
    if isinstance(one.model, Merged):
        shared = _content(one.deltas, one.shifts)
        return {task: fingerprint([shared, _own_content(one.own[task]), part]) for task, part in one.parts.items()}
    known = {name: str(part["sha256"]) for name, part in {**one.parts, **one.bodies}.items()}
    return {task: sha256 or file_fingerprint(one.model.path) for task, sha256 in known.items()}


def _content(deltas: Mapping[str, Delta], shifts: Tensors) -> list[str]:
    """A SHA-256 for each Delta, and one for all shifts: no more than one Delta is looked at at a time."""
    return [
        *(tensor_file_sha256(vars(deltas[site]), {"site": site}) for site in sorted(deltas)),
        tensor_file_sha256(shifts, {}),
    ]


def _own_content(own: Own) -> list[str]:
    return [*_content(own.deltas, own.shifts), tensor_file_sha256(own.head, {})]


def check_together(ingredients: Sequence[Ingredient]) -> None:
    """Raise CompositionError unless the inputs have one base and different tasks, and at least one has a task."""
    if not ingredients:
        raise CompositionError("merge", "no adapters", "at least one", "name their files")
    if not any(one.parts for one in ingredients):
        raise CompositionError(
            "merge",
            f"no head in any of {', '.join(one.name for one in ingredients)}",
            "at least one input with a task",
            "train one with its head's modules in modules_to_save",
        )
    first = ingredients[0]
    seen: set[str] = set()
    for one in ingredients:
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
