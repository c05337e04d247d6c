"""Patches: changes of an encoder, and the parameters needed in addition to the encoder to predict a task."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, add, norm
from mergekit_bert.adapters.extra import NONE, Shapes, Virtual, shapes_of
from mergekit_bert.adapters.family import Tensors, extra_of
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.head import Head, head_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import linear_layers
from mergekit_bert.errors import ModelFileError

Extras = Mapping[str, Tensors]
"""Tensors that are new to an encoder, by the extra's name (:mod:`mergekit_bert.adapters.extra`)."""
REWRITE = "write the file again with this version of mbert"


@dataclass(frozen=True)
class Patch:
    """A change of an encoder: Deltas of weights by site, shifts of other parameters by name, and extras."""

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    shifts: Tensors = field(default_factory=dict)
    extras: Extras = field(default_factory=dict)

    @property
    def lazy(self) -> bool:
        """Whether its Deltas are read or made anew whenever they are asked for, which may take long."""
        return not isinstance(self.deltas, dict)

    def described(self) -> dict[str, Any]:
        """Size, rank and norm of every Delta, size and norm of every shift and extra, as JSON."""
        sites = {
            site: {"size": list(delta.shape), "rank": delta.rank, "norm": norm(delta)}
            for site, delta in self.deltas.items()
        }
        shifts = {name: _size(tensor) for name, tensor in self.shifts.items()}
        extras = {f"{name}.{key}": _size(tensor) for name, own in self.extras.items() for key, tensor in own.items()}
        return {"sites": sites, "shifts": shifts, "extras": extras}


def _size(tensor: Tensor) -> dict[str, Any]:
    """Size and norm, as JSON."""
    return {"size": list(tensor.shape), "norm": float(torch.linalg.vector_norm(tensor.double()))}


@dataclass(frozen=True)
class TaskSpecific:
    """The task-specific parameters of a task in a merge: head, extras, and Deltas and shifts added to the shared ones.

    The Deltas and shifts are those between the layers and the head and, if requested, the task's residuals inside the
    layers.
    """

    head: Tensors
    deltas: Mapping[str, Delta]
    shifts: Tensors
    extras: Extras = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        extras = (tensor for own in self.extras.values() for tensor in own.values())
        return sum(one.nbytes for one in (*self.head.values(), *self.deltas.values(), *self.shifts.values(), *extras))

    def read(self) -> "TaskSpecific":
        """The same parameters, all in memory, in float32."""
        return TaskSpecific(
            self.head,
            {site: delta.to(torch.float32) for site, delta in self.deltas.items()},
            {name: shift.float() for name, shift in self.shifts.items()},
            self.extras,
        )


@dataclass(frozen=True)
class Part:
    """Everything needed to predict one task: Deltas by site, shifts of other parameters by name, a head, and extras."""

    task: Task
    max_length: int
    deltas: Mapping[str, Delta]
    shifts: Tensors
    head: Tensors
    extras: Extras = field(default_factory=dict)

    @property
    def virtual(self) -> Virtual:
        """The virtual tokens of its sequences."""
        return virtual_tokens({name: shapes_of(own) for name, own in self.extras.items()})

    def over(self, shared: Patch) -> "Part":
        """The sum of ``shared`` and this part."""
        deltas, shifts = {**shared.deltas, **self.deltas}, {**shared.shifts, **self.shifts}
        deltas |= {site: add([shared.deltas[site], self.deltas[site]]) for site in self.deltas if site in shared.deltas}
        shifts |= {name: shared.shifts[name] + self.shifts[name] for name in self.shifts if name in shared.shifts}
        return dataclasses.replace(self, deltas=deltas, shifts=shifts)

    def tokens(self, encoder: Encoder, rows: Rows) -> Tokens:
        """Rows of its task as its head reads them, without their labels."""
        unlabelled = dataclasses.replace(rows, labels=None)
        return tokens_of(encoder, self.task, unlabelled, head_of(self.head), self.max_length, self.virtual)


def virtual_tokens(shapes: Mapping[str, Shapes]) -> Virtual:
    """The virtual tokens of extras whose tensors have these shapes, by their names."""
    return reduce(Virtual.beside, (extra_of(name).virtual(own) for name, own in shapes.items()), NONE)


def tokens_of(encoder: Encoder, task: Task, rows: Rows, head: Head, max_length: int, virtual: Virtual) -> Tokens:
    """Rows as ``head`` reads them, at most ``max_length`` tokens a sequence, the virtual ones included."""
    room = max_length - virtual.total
    tokens = tokenise(rows, task, encoder.tokenizer, room, encoder.pad_token, head.apart)
    # Numbers that no word has: those after the last word's.
    first = encoder.words.num_embeddings
    numbers = list(range(first, first + virtual.before + virtual.after))
    return tokens.around_first(numbers[: virtual.before], numbers[virtual.before :])


def room_for_text(encoder: Encoder, task: Task, head: Head, max_length: int, virtual: Virtual) -> tuple[int, int]:
    """How many tokens of a sequence are left for texts and special tokens, and how many these need at least."""
    texts = 1 if head.apart else len(task.text)
    return max_length - virtual.total, texts + int(encoder.tokenizer.num_special_tokens_to_add(texts > 1))


def check_part(where: str, part: Part, encoder: Encoder) -> None:
    """Raise ModelFileError unless the part's sites, shifts and head fit ``encoder``."""
    layers = linear_layers(encoder)
    parameters = {name: tuple(p.shape) for name, p in encoder.model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {f"site {site}": delta.shape for site, delta in part.deltas.items()}
    expected: dict[str, tuple[int, ...]] = {f"site {site}": size for site, size in layers.items()}
    found |= {f"shift {name}": tuple(tensor.shape) for name, tensor in part.shifts.items()}
    expected |= {f"shift {name}": shape for name, shape in parameters.items()}
    head = {f"head {name}": shape for name, shape in head_shapes(encoder.config, part.task, head_of(part.head)).items()}
    found |= {f"head {name}": tuple(tensor.shape) for name, tensor in part.head.items()}
    for name in head:
        if name not in found:
            raise ModelFileError(where, f"no {name}", f"a head of {encoder.config.model_type}", REWRITE)
    expected |= head
    _check_extras(where, part, encoder)
    for name, shape in found.items():
        if expected.get(name) != shape:
            raise ModelFileError(
                where,
                f"{name} has shape {shape}",
                f"{expected.get(name, 'nothing there')}",
                "give the base it was trained on",
            )


def _check_extras(where: str, part: Part, encoder: Encoder) -> None:
    """Raise ModelFileError unless the part's extras fit ``encoder`` and leave room for text, or EncoderError."""
    for name, tensors in part.extras.items():
        extra = extra_of(name)
        found, expected = extra.size_of(shapes_of(tensors)), extra.size(encoder)
        if found != expected:
            raise ModelFileError(
                where,
                f"a {name} of size {found}",
                f"{expected} for {encoder.name!r}",
                "give the base it was trained on",
            )
    room, least = room_for_text(encoder, part.task, head_of(part.head), part.max_length, part.virtual)
    if part.extras and room < least:
        taken = f"{part.virtual.total} virtual tokens of at most {part.max_length} in a sequence"
        raise ModelFileError(where, taken, f"at least {least} left for text", REWRITE)
