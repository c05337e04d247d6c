"""The protocol of all models (adapters, compositions, whole models), and the two compositions.

A composition is Merged (one Delta per site, all heads) or an Ensemble (all adapters, and a router). Code uses the
protocol and does not check which model it has.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta, LowRank, factors
from mergekit_bert.adapters.families import lora
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.patch import Part, Patch, TaskSpecific
from mergekit_bert.adapters.patched import Patched
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.encoder.ready import Ready
from mergekit_bert.errors import CompositionError
from mergekit_bert.model_methods import mebibytes, summary
from mergekit_bert.patterns import exactly

STEPS = ("search", "scales", "heads")
"""Optional steps after a merge, in this order; each is recorded in the trace."""
Seen = list[tuple[str, str, str, frozenset[str]]]
"""Rows whose labels a model has seen: step, task, fingerprint, hashes of the texts (older files record none)."""


class Answering(Protocol):
    """A model prepared for prediction; everything needed is built on first use."""

    @property
    def model(self) -> Any:
        """The model, on its encoder."""

    @property
    def encoder(self) -> Encoder:
        """Its base encoder; raises CompositionError for a model that contains its encoder."""

    @property
    def shared(self) -> Encoder:
        """The encoder with the parameters that all tasks share."""

    def own_parts(self) -> Any:
        """The task-specific parameters, in the order of the tasks."""

    def ready(self, task: Task) -> Ready:
        """The classifier of ``task``."""


@runtime_checkable
class Model(Protocol):
    """The protocol of all models."""

    @property
    def stands_alone(self) -> bool:
        """Whether it predicts without its base."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Its tasks."""

    @property
    def base(self) -> Base:
        """The encoder that it was trained on."""

    @property
    def needs_base(self) -> bool:
        """Whether its Deltas cannot be computed before it is put :meth:`on` its base."""

    def on(self, encoder: Encoder) -> Any:
        """The same model with ``encoder`` as its base."""

    def answering(self, encoder: Encoder | None, where: str) -> Any:
        """The model as an :class:`Answering`; raises ModelFileError unless it fits ``encoder``."""

    def role(self) -> str:
        """Its name in tables."""

    def seen(self) -> Seen:
        """The rows whose labels were read since its adapters were trained."""

    def sha256(self) -> str | None:
        """SHA-256 (hex) of the adapter; None for other models."""

    def sha256_of(self, task: str) -> str | None:
        """SHA-256 (hex) of the adapter of ``task``; None if there is none."""

    def described(self) -> dict[str, Any]:
        """Description of the model as JSON, without base and role."""


@dataclass(frozen=True, repr=False)
class Merged(Patched):
    """Several adapters merged into one Delta per site; ``own`` has the task-specific parameters of each task.

    ``parts`` is the provenance of each adapter by task name (its file's record), ``weights`` the weight of each input,
    ``recipe`` how it was merged, and ``trace`` what was learned, lost and calibrated. ``kept`` are the inputs, if they
    are stored so that inputs can be added and removed. ``bodies`` is the provenance of adapters without a head: they
    have a weight, but no task.
    """

    kind = "merged"

    method: str
    weights: Mapping[str, float]
    base: Base
    deltas: Mapping[str, Delta]
    shifts: Tensors
    own: Mapping[str, TaskSpecific]
    parts: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trace: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Adapter] = field(default_factory=dict)
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line; without the size for a lazy merge, which would have to be computed for it."""
        size = ""
        if not self.lazy:
            size = mebibytes(
                sum(update.nbytes for update in (*self.deltas.values(), *self.shifts.values()))
                + sum(specific.nbytes for specific in self.own.values())
            )
        base, sites = f"base {self.base.name!r}", f"{len(self.deltas)} sites"
        return summary("Merged", self.tasks, self.title if size else self.method, base, sites, size)

    @property
    def lazy(self) -> bool:
        """Whether its Deltas are read or made anew whenever they are asked for."""
        return self.shared.lazy

    @property
    def title(self) -> str:
        """The method and the steps that changed the result: ``ties + private 4 + search + heads``."""
        taken = {step for step, _ in steps_in(self.trace)}
        private = [f"private {self.private['rank']}"] if self.private else []
        return " + ".join([self.method, *private, *(step for step in STEPS if step in taken)])

    @property
    def private(self) -> dict[str, int]:
        """The largest ``rank`` of the tasks' residuals of shared Deltas, and their ``bytes``; empty if none."""
        deltas = [
            delta for specific in self.own.values() for site, delta in specific.deltas.items() if site in self.deltas
        ]
        shifts = [
            shift for specific in self.own.values() for name, shift in specific.shifts.items() if name in self.shifts
        ]
        if not (deltas or shifts):
            return {}
        ranks = [min(delta.shape) if delta.rank is None else delta.rank for delta in deltas]
        return {"rank": max(ranks, default=0), "bytes": sum(one.nbytes for one in [*deltas, *shifts])}

    def role(self) -> str:
        """Its name in tables."""
        return self.title

    def seen(self) -> Seen:
        """The rows whose labels were read since its adapters were trained."""
        return seen_in(self.trace)

    @property
    def needs_base(self) -> bool:
        """False: its Deltas are stored. The inputs that it keeps may need a base."""
        return False

    def on(self, encoder: Encoder) -> "Merged":
        """The same model, with the inputs that it keeps on ``encoder``."""
        return dataclasses.replace(self, kept={name: adapter.on(encoder) for name, adapter in self.kept.items()})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Its tasks, in the order of the merge."""
        return tuple(Task.from_json(part["task"]) for part in self.parts.values())

    @property
    def shared(self) -> Patch:
        """The merged Deltas, and the merged bias and norm updates."""
        return Patch(self.deltas, self.shifts)

    def own_part(self, task: str) -> Part:
        """The task-specific parameters of ``task``."""
        record, specific = self.parts[task], self.own[task]
        return Part(
            Task.from_json(record["task"]),
            int(record["max_length"]),
            specific.deltas,
            specific.shifts,
            specific.head,
            specific.extras,
        )

    def as_adapter(self, task: str) -> Adapter:
        """A LoRA with the same predictions for ``task``; raises CompositionError if a Delta is dense."""
        return low_rank(self.part(task), self.base, {"method": self.method, "weights": dict(self.weights)})

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the adapter of ``task`` that was merged."""
        return str(self.parts[task]["sha256"])

    def origin(self, task: str) -> dict[str, Any]:
        """Provenance of the weights for ``task``, and the rows whose labels were read for them."""
        seen = [
            {"step": step, "fingerprint": fingerprint, "texts": sorted(hashes)}
            for step, name, fingerprint, hashes in self.seen()
            if name == task
        ]
        return {**self.parts[task], "method": self.method, "weights": dict(self.weights), "seen": seen}

    def keeping(self, inputs: Mapping[str, Adapter]) -> "Merged":
        """The same model with its ``inputs`` stored in it."""
        return dataclasses.replace(self, kept=inputs)

    def brief(self, how: str = "") -> str:
        """The method (or ``how``), and the weight of every input."""
        counted = ", ".join(f"{name} × {weight:.3g}" for name, weight in self.weights.items())
        return f"{how or self.method} of {counted}"

    def account(self) -> str:
        """One line: method, inputs with weights, number of sites, ranks."""
        ranks = sorted({delta.rank for delta in self.deltas.values() if delta.rank is not None})
        low = f"rank {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(f"rank {rank}" for rank in ranks)
        dense = sum(delta.rank is None for delta in self.deltas.values())
        shown = ", ".join(filter(None, [low, f"{dense} dense" if dense else ""])) or "nothing to merge"
        space = self.recipe.get("space", "full")
        where = f" in {space} space" if space != "full" else ""
        return f"{self.brief(f'{self.title}{where}')}; {len(self.deltas)} sites, {shown}"

    def described(self) -> dict[str, Any]:
        """Description of the model as JSON, without base and role."""
        return {
            "method": self.method,
            "space": self.recipe.get("space", "full"),
            "weights": dict(self.weights),
            "private": self.private,
            "parts": dict(self.parts),
            "bodies": dict(self.bodies),
            **self.shared.described(),
            "own": {
                task: Patch(specific.deltas, specific.shifts, specific.extras).described()
                for task, specific in self.own.items()
            },
        }


def steps_in(trace: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The steps after the merge and their records, including those of merged inputs."""
    waiting: list[Mapping[str, Any]] = [trace]
    while waiting:
        trace = waiting.pop()
        waiting += trace.get("inputs", {}).values()
        records = {**trace, **trace.get("calibrated", {})}
        yield from ((step, records[step]) for step in STEPS if step in records)


def seen_in(trace: Mapping[str, Any]) -> Seen:
    """The rows whose labels were read by the steps recorded in ``trace``."""
    return [
        (step, task, str(rows["fingerprint"]), frozenset(map(str, rows.get("texts", ()))))
        for step, record in steps_in(trace)
        for task, rows in record.get("rows", {}).items()
    ]


@dataclass(frozen=True, repr=False)
class Ensemble(Patched):
    """All adapters, unmerged; ``router`` names how the expert of a row is chosen (``task``: by the task's name)."""

    kind = "ensemble"

    experts: Mapping[str, Adapter]
    router: str = "task"

    def __repr__(self) -> str:
        """One line."""
        return summary("Ensemble", self.tasks, f"router {self.router!r}", f"base {self.base.name!r}")

    @property
    def recipe(self) -> dict[str, Any]:
        """Empty: nothing was merged."""
        return {}

    @property
    def trace(self) -> dict[str, Any]:
        """Empty: nothing was learned or lost."""
        return {}

    @property
    def private(self) -> dict[str, int]:
        """Empty: there are no residuals."""
        return {}

    @property
    def base(self) -> Base:
        """The base of all experts."""
        return next(iter(self.experts.values())).base

    @property
    def needs_base(self) -> bool:
        """Whether one of the experts needs its base."""
        return any(expert.needs_base for expert in self.experts.values())

    def on(self, encoder: Encoder) -> "Ensemble":
        """The same model, with all experts on ``encoder``."""
        return dataclasses.replace(self, experts={name: expert.on(encoder) for name, expert in self.experts.items()})

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Its tasks, in the order of the experts."""
        return tuple(expert.task for expert in self.experts.values())

    def own_part(self, task: str) -> Part:
        """The expert of ``task``: nothing is shared."""
        return self.experts[task].own_part(task)

    def role(self) -> str:
        """Its name in tables."""
        return self.kind

    def as_adapter(self, task: str) -> Adapter:
        """The expert of ``task``."""
        return self.experts[task]

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the expert of ``task``."""
        return self.experts[task].sha256()

    def origin(self, task: str) -> dict[str, Any]:
        """Provenance of the weights for ``task``."""
        return {**self.experts[task].provenance(), "method": self.kind}

    def keeping(self, inputs: Mapping[str, Adapter]) -> "Ensemble":
        """The model itself: its experts are its inputs."""
        return self

    def brief(self) -> str:
        """Empty: inputs have no weights."""
        return ""

    def account(self) -> str:
        """One line: its experts."""
        return f"ensemble of {', '.join(self.experts)}, routed by task"

    def described(self) -> dict[str, Any]:
        """Description of the model as JSON, without base and role."""
        return {
            "router": self.router,
            "parts": {name: expert.described_part() for name, expert in self.experts.items()},
            "own": {name: expert.described_changes() for name, expert in self.experts.items()},
        }


def low_rank(part: Part, base: Base, training: Mapping[str, Any]) -> Adapter:
    """A part as a LoRA with a rank per site; raises CompositionError for a dense Delta or an extra."""
    if part.extras:
        raise CompositionError(
            f"task {part.task.name!r}",
            f"a {' and a '.join(part.extras)} beside its Deltas",
            "Deltas and shifts alone, for a PEFT folder",
            "keep it as a file of mbert",
        )
    low: dict[str, LowRank] = {}
    for site, delta in part.deltas.items():
        if delta.rank is None:
            raise CompositionError(
                f"site {site!r}", "a dense Delta", "low-rank ones, for PEFT", "give `rank=R` at merge, or `to=hf`"
            )
        if delta.rank > 0:
            low[site] = factors(delta)
    ranks = {site: delta.rank for site, delta in low.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    exceptions = {site: rank for site, rank in ranks.items() if rank != usual}
    config = AdapterConfig(
        rank=usual,
        alpha=float(usual),
        targets=exactly(low),
        basis="random",
        rank_pattern=exceptions,
        alpha_pattern={site: float(rank) for site, rank in exceptions.items()},
    )
    return Adapter(
        type=lora.RECORD.name,
        config=config,
        task=part.task,
        base=base,
        max_length=part.max_length,
        sites={site: delta.shape for site, delta in low.items()},
        tensors={site: delta.tensors() for site, delta in low.items()},
        shifts=part.shifts,
        head=part.head,
        basis=None,
        training=training,
        scores={},
    )


Composition = Adapter | Merged | Ensemble
"""A model stored in a file of mbert."""
Stored = Composition | FullModel
"""A model that can be read from a path."""


def as_merged(model: Model, where: str, found: str, expected: str, remedy: str) -> Merged:
    """``model`` if it is a merged one; otherwise raises CompositionError with this message."""
    if isinstance(model, Merged):
        return model
    raise CompositionError(where, found, expected, remedy)


def as_composition(model: Model, where: str) -> Composition:
    """``model`` if it is a composition; raises CompositionError for a whole model."""
    if isinstance(model, Composition):
        return model
    raise CompositionError(where, "a whole model", "an adapter, merged or ensemble file", "give one of these")


def find_task(model: Model, name: str) -> Task:
    """The task called ``name`` of ``model``; raises CompositionError."""
    for task in model.tasks:
        if task.name == name:
            return task
    raise CompositionError(
        "`task`",
        f"{name!r}",
        f"one of {', '.join(task.name for task in model.tasks)}",
        "name a task of the model",
    )
