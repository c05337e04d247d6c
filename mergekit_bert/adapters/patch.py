"""Patches: what is added to an encoder, and what it takes beside the encoder to answer a task."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_bert.adapters.delta import Delta, add, norm
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.head import head_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import linear_layers
from mergekit_bert.errors import ModelFileError

REWRITE = "write the file again with this version of mbert"


@dataclass(frozen=True)
class Patch:
    """A change of an encoder: Deltas of weights by site, shifts of other parameters by name."""

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    shifts: Tensors = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Size, rank and norm of every Delta, size and norm of every shift, as JSON."""
        sites = {
            site: {"size": list(delta.shape), "rank": delta.rank, "norm": norm(delta)}
            for site, delta in self.deltas.items()
        }
        shifts = {
            name: {"size": list(tensor.shape), "norm": float(torch.linalg.vector_norm(tensor.double()))}
            for name, tensor in self.shifts.items()
        }
        return {"sites": sites, "shifts": shifts}


@dataclass(frozen=True)
class TaskSpecific:
    """What a task keeps for itself in a merge: its head, and Deltas and shifts that are added to what all share.

    They are those between the layers and the head, and, where asked for, the task's residuals inside the layers.
    """

    head: Tensors
    deltas: Mapping[str, Delta]
    shifts: Tensors

    def read(self) -> "TaskSpecific":
        """The same with all of it in memory, in float32."""
        return TaskSpecific(
            self.head,
            {site: delta.to(torch.float32) for site, delta in self.deltas.items()},
            {name: shift.float() for name, shift in self.shifts.items()},
        )


@dataclass(frozen=True)
class Part:
    """What it takes to answer one task: Deltas by site, shifts of other parameters by name, and a head."""

    task: Task
    max_length: int
    deltas: Mapping[str, Delta]
    shifts: Tensors
    head: Tensors

    def over(self, shared: Patch) -> "Part":
        """The same with ``shared`` added to it: the sum that its task runs with."""
        deltas, shifts = {**shared.deltas, **self.deltas}, {**shared.shifts, **self.shifts}
        deltas |= {site: add([shared.deltas[site], self.deltas[site]]) for site in self.deltas if site in shared.deltas}
        shifts |= {name: shared.shifts[name] + self.shifts[name] for name in self.shifts if name in shared.shifts}
        return dataclasses.replace(self, deltas=deltas, shifts=shifts)

    def tokens(self, encoder: Encoder, rows: Rows) -> Tokens:
        """Rows of its task as its head reads them, without their labels."""
        unlabelled = dataclasses.replace(rows, labels=None)
        apart = head_of(self.head).apart
        return tokenise(unlabelled, self.task, encoder.tokenizer, self.max_length, encoder.pad_token, apart)


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
    for name, shape in found.items():
        if expected.get(name) != shape:
            raise ModelFileError(
                where,
                f"{name} has shape {shape}",
                f"{expected.get(name, 'nothing there')}",
                "give the base it was trained on",
            )
