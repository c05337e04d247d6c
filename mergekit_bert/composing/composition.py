"""Compositions in memory: Merged (one Delta per site, all heads) or Ensemble (all adapters, and a router)."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_bert.adapters.adapter import Adapter, Base, Part, Tensors
from mergekit_bert.adapters.delta import Delta, add
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.model_methods import CompositionMethods, mebibytes, summary

STEPS = ("search", "scales", "heads")
"""What may be done beside a merge, in this order; a trace tells of each."""


@dataclass(frozen=True)
class Own:
    """What a task keeps for itself in a merge: its head, and Deltas and shifts that are added to what all share.

    They are those between the layers and the head, and, where asked for, the task's remainders inside the layers.
    """

    head: Tensors
    deltas: Mapping[str, Delta]
    shifts: Tensors

    def read(self) -> "Own":
        """The same with all of it in memory, in float32."""
        return Own(
            self.head,
            {site: delta.to(torch.float32) for site, delta in self.deltas.items()},
            {name: shift.float() for name, shift in self.shifts.items()},
        )


@dataclass(frozen=True, repr=False)
class Merged(CompositionMethods):
    """Several adapters in one Delta per site of the layers; ``own`` is what every task keeps for itself.

    ``parts`` is the provenance of each adapter by task name (its file's record), ``weights`` what each input counted,
    ``recipe`` how it was made, and ``trace`` what was learned and lost on the way. ``kept`` are the inputs themselves,
    where they were kept so that others can be added and they can be removed. ``bodies`` is the provenance of adapters
    that had no head: they count in ``weights``, and no task is theirs.
    """

    method: str
    weights: Mapping[str, float]
    base: Base
    deltas: Mapping[str, Delta]
    shifts: Tensors
    own: Mapping[str, Own]
    parts: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trace: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Adapter] = field(default_factory=dict)
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line; of a lazy merge without its size, for which it would have to be made."""
        size = ""
        if isinstance(self.deltas, dict):
            heads = (tensor for own in self.own.values() for tensor in (*own.head.values(), *own.shifts.values()))
            deltas = (delta for own in self.own.values() for delta in own.deltas.values())
            size = mebibytes(sum(one.nbytes for one in (*self.deltas.values(), *deltas, *self.shifts.values(), *heads)))
        base, sites = f"base {self.base.name!r}", f"{len(self.deltas)} sites"
        return summary("Merged", self.tasks, self.title if size else self.method, base, sites, size)

    @property
    def title(self) -> str:
        """The method and what was done beside it that changed its figures: ``ties + private 4 + search + heads``."""
        taken = {step for step, _ in self.steps()}
        private = [f"private {self.private['rank']}"] if self.private else []
        return " + ".join([self.method, *private, *(step for step in STEPS if step in taken)])

    @property
    def private(self) -> dict[str, int]:
        """The largest ``rank`` of the tasks' remainders beside shared Deltas, and the ``bytes`` of all; empty: none."""
        deltas = [delta for own in self.own.values() for site, delta in own.deltas.items() if site in self.deltas]
        shifts = [shift for own in self.own.values() for name, shift in own.shifts.items() if name in self.shifts]
        if not (deltas or shifts):
            return {}
        ranks = [min(delta.shape) if delta.rank is None else delta.rank for delta in deltas]
        return {"rank": max(ranks, default=0), "bytes": sum(one.nbytes for one in [*deltas, *shifts])}

    def steps(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The steps beside the merge and what is told of each, those of the merges that it was made from as well."""
        waiting: list[Mapping[str, Any]] = [self.trace]
        while waiting:
            trace = waiting.pop()
            waiting += trace.get("inputs", {}).values()
            told = {**trace, **trace.get("calibrated", {})}
            yield from ((step, told[step]) for step in STEPS if step in told)

    def seen(self) -> list[tuple[str, str, str, frozenset[str]]]:
        """The rows whose labels it has seen since its adapters were trained: step, task, fingerprint, texts' hashes.

        Files of before there were hashes have none.
        """
        return [
            (step, task, str(rows["fingerprint"]), frozenset(map(str, rows.get("texts", ()))))
            for step, told in self.steps()
            for task, rows in told.get("rows", {}).items()
        ]

    @property
    def needs_base(self) -> bool:
        """No: its Deltas are its own. The inputs that it kept may need one."""
        return False

    def on(self, encoder: Encoder) -> "Merged":
        """The same, with the inputs that it kept on ``encoder``."""
        return dataclasses.replace(self, kept={name: one.on(encoder) for name, one in self.kept.items()})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks it answers, in the order of the merge."""
        return tuple(Task.from_json(part["task"]) for part in self.parts.values())

    def part(self, task: str) -> Part:
        """The merged Deltas and shifts, with ``task``'s own added."""
        record, own = self.parts[task], self.own[task]
        deltas, shifts = {**self.deltas, **own.deltas}, {**self.shifts, **own.shifts}
        deltas |= {site: add([self.deltas[site], own.deltas[site]]) for site in own.deltas if site in self.deltas}
        shifts |= {name: self.shifts[name] + own.shifts[name] for name in own.shifts if name in self.shifts}
        return Part(Task.from_json(record["task"]), int(record["max_length"]), deltas, shifts, own.head)


@dataclass(frozen=True, repr=False)
class Ensemble(CompositionMethods):
    """All adapters as they are; ``router`` names how a row finds its expert (``task``: by the task's name)."""

    experts: Mapping[str, Adapter]
    router: str = "task"

    def __repr__(self) -> str:
        """One line."""
        return summary("Ensemble", self.tasks, f"router {self.router!r}", f"base {self.base.name!r}")

    @property
    def base(self) -> Base:
        """The base of all experts."""
        return next(iter(self.experts.values())).base

    @property
    def needs_base(self) -> bool:
        """Whether one of the experts does."""
        return any(expert.needs_base for expert in self.experts.values())

    def on(self, encoder: Encoder) -> "Ensemble":
        """The same, with all experts on ``encoder``."""
        return dataclasses.replace(self, experts={name: one.on(encoder) for name, one in self.experts.items()})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks it answers, in the order of the experts."""
        return tuple(expert.task for expert in self.experts.values())

    def part(self, task: str) -> Part:
        """The expert of ``task``."""
        return self.experts[task].part(task)


Composition = Adapter | Merged | Ensemble
Model = Composition | FullModel


def find_task(model: Model, name: str) -> Task:
    """The task called ``name`` of ``model``; raises CompositionError."""
    for task in model.tasks:
        if task.name == name:
            return task
    raise CompositionError(
        "`task`",
        f"{name!r}",
        f"one of {', '.join(task.name for task in model.tasks)}",
        "name a task that the file answers",
    )
