"""Models: what adapters, compositions of them and whole models say of themselves, so that nobody asks which one it is.

A composition is Merged (one Delta per site, all heads) or an Ensemble (all adapters, and a router).
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
"""What may be done beside a merge, in this order; a trace tells of each."""
Seen = list[tuple[str, str, str, frozenset[str]]]
"""Rows whose labels a model has seen: step, task, fingerprint, texts' hashes (none in files of before there were)."""


class Answering(Protocol):
    """A model as it stands ready to answer; what is made for that is made when it is first asked for."""

    @property
    def model(self) -> Any:
        """The model, on its encoder."""

    @property
    def encoder(self) -> Encoder:
        """The encoder below it; raises CompositionError for a model that has one of its own."""

    @property
    def shared(self) -> Encoder:
        """The encoder with what all its tasks share."""

    def own_parts(self) -> Any:
        """What each task adds to :attr:`shared`, in the order of the tasks."""

    def ready(self, task: Task) -> Ready:
        """The classifier of ``task``."""


@runtime_checkable
class Model(Protocol):
    """What every model says of itself, whatever it is made of."""

    @property
    def stands_alone(self) -> bool:
        """Whether it answers without its base."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks it answers."""

    @property
    def base(self) -> Base:
        """The encoder that it was made from."""

    @property
    def needs_base(self) -> bool:
        """Whether its Deltas cannot be made before it is put :meth:`on` its base."""

    def on(self, encoder: Encoder) -> Any:
        """The same on ``encoder``, its base."""

    def answering(self, encoder: Encoder | None, where: str) -> Any:
        """It as an :class:`Answering`; raises ModelFileError unless it fits ``encoder``."""

    def role(self) -> str:
        """What it is called in tables."""

    def seen(self) -> Seen:
        """The rows whose labels it has seen since its adapters were trained."""

    def sha256(self) -> str | None:
        """SHA-256 (hex) of an adapter; None for other models."""

    def sha256_of(self, task: str) -> str | None:
        """SHA-256 (hex) of the adapter that ``task`` was trained as; None where there is none."""

    def described(self) -> dict[str, Any]:
        """What there is to tell of it, as JSON, apart from its base and its role."""


@dataclass(frozen=True, repr=False)
class Merged(Patched):
    """Several adapters in one Delta per site of the layers; ``own`` is what every task keeps for itself.

    ``parts`` is the provenance of each adapter by task name (its file's record), ``weights`` what each input counted,
    ``recipe`` how it was made, and ``trace`` what was learned and lost on the way. ``kept`` are the inputs themselves,
    where they were kept so that others can be added and they can be removed. ``bodies`` is the provenance of adapters
    that had no head: they count in ``weights``, and no task is theirs.
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
        """One line; of a lazy merge without its size, for which it would have to be made."""
        size = ""
        if not self.lazy:
            size = mebibytes(
                sum(one.nbytes for one in (*self.deltas.values(), *self.shifts.values()))
                + sum(own.nbytes for own in self.own.values())
            )
        base, sites = f"base {self.base.name!r}", f"{len(self.deltas)} sites"
        return summary("Merged", self.tasks, self.title if size else self.method, base, sites, size)

    @property
    def lazy(self) -> bool:
        """Whether its Deltas are read or made anew whenever they are asked for."""
        return self.shared.lazy

    @property
    def title(self) -> str:
        """The method and what was done beside it that changed its figures: ``ties + private 4 + search + heads``."""
        taken = {step for step, _ in steps_in(self.trace)}
        private = [f"private {self.private['rank']}"] if self.private else []
        return " + ".join([self.method, *private, *(step for step in STEPS if step in taken)])

    @property
    def private(self) -> dict[str, int]:
        """The largest ``rank`` of the tasks' residuals beside shared Deltas, and the ``bytes`` of all; empty: none."""
        deltas = [delta for own in self.own.values() for site, delta in own.deltas.items() if site in self.deltas]
        shifts = [shift for own in self.own.values() for name, shift in own.shifts.items() if name in self.shifts]
        if not (deltas or shifts):
            return {}
        ranks = [min(delta.shape) if delta.rank is None else delta.rank for delta in deltas]
        return {"rank": max(ranks, default=0), "bytes": sum(one.nbytes for one in [*deltas, *shifts])}

    def role(self) -> str:
        """What it is called in tables."""
        return self.title

    def seen(self) -> Seen:
        """The rows whose labels it has seen since its adapters were trained."""
        return seen_in(self.trace)

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

    @property
    def shared(self) -> Patch:
        """The merged Deltas and shifts."""
        return Patch(self.deltas, self.shifts)

    def own_part(self, task: str) -> Part:
        """What ``task`` keeps for itself."""
        record, own = self.parts[task], self.own[task]
        return Part(
            Task.from_json(record["task"]), int(record["max_length"]), own.deltas, own.shifts, own.head, own.extras
        )

    def as_adapter(self, task: str) -> Adapter:
        """A LoRA that answers ``task`` as it does; raises CompositionError where a Delta is dense."""
        return low_rank(self.part(task), self.base, {"method": self.method, "weights": dict(self.weights)})

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the adapter that ``task`` was trained as."""
        return str(self.parts[task]["sha256"])

    def origin(self, task: str) -> dict[str, Any]:
        """How the weights that answer ``task`` came about, and which rows' labels they saw."""
        seen = [
            {"step": step, "fingerprint": fingerprint, "texts": sorted(hashes)}
            for step, name, fingerprint, hashes in self.seen()
            if name == task
        ]
        return {**self.parts[task], "method": self.method, "weights": dict(self.weights), "seen": seen}

    def keeping(self, inputs: Mapping[str, Adapter]) -> "Merged":
        """The same with its ``inputs`` kept."""
        return dataclasses.replace(self, kept=inputs)

    def brief(self, how: str = "") -> str:
        """How it was made (its method, unless ``how`` says more), and what every input counted."""
        counted = ", ".join(f"{name} × {weight:.3g}" for name, weight in self.weights.items())
        return f"{how or self.method} of {counted}"

    def account(self) -> str:
        """In a line: how it was made, of what, and what it holds."""
        ranks = sorted({delta.rank for delta in self.deltas.values() if delta.rank is not None})
        low = f"rank {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(f"rank {rank}" for rank in ranks)
        dense = sum(delta.rank is None for delta in self.deltas.values())
        shown = ", ".join(filter(None, [low, f"{dense} dense" if dense else ""])) or "nothing to merge"
        space = self.recipe.get("space", "full")
        where = f" in {space} space" if space != "full" else ""
        return f"{self.brief(f'{self.title}{where}')}; {len(self.deltas)} sites, {shown}"

    def described(self) -> dict[str, Any]:
        """What there is to tell of it, as JSON, apart from its base and its role."""
        return {
            "method": self.method,
            "space": self.recipe.get("space", "full"),
            "weights": dict(self.weights),
            "private": self.private,
            "parts": dict(self.parts),
            "bodies": dict(self.bodies),
            **self.shared.described(),
            "own": {task: Patch(own.deltas, own.shifts, own.extras).described() for task, own in self.own.items()},
        }


def steps_in(trace: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The steps beside a merge and what its ``trace`` tells of each, those of the merges that it was made from too."""
    waiting: list[Mapping[str, Any]] = [trace]
    while waiting:
        trace = waiting.pop()
        waiting += trace.get("inputs", {}).values()
        told = {**trace, **trace.get("calibrated", {})}
        yield from ((step, told[step]) for step in STEPS if step in told)


def seen_in(trace: Mapping[str, Any]) -> Seen:
    """The rows whose labels the steps of a merge have seen, by its ``trace``."""
    return [
        (step, task, str(rows["fingerprint"]), frozenset(map(str, rows.get("texts", ()))))
        for step, told in steps_in(trace)
        for task, rows in told.get("rows", {}).items()
    ]


@dataclass(frozen=True, repr=False)
class Ensemble(Patched):
    """All adapters as they are; ``router`` names how a row finds its expert (``task``: by the task's name)."""

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
        """Empty: no task keeps anything beside what is shared."""
        return {}

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

    def own_part(self, task: str) -> Part:
        """The expert of ``task``: nothing is shared."""
        return self.experts[task].own_part(task)

    def role(self) -> str:
        """What it is called in tables."""
        return self.kind

    def as_adapter(self, task: str) -> Adapter:
        """The expert of ``task``."""
        return self.experts[task]

    def sha256_of(self, task: str) -> str:
        """SHA-256 of the expert of ``task``."""
        return self.experts[task].sha256()

    def origin(self, task: str) -> dict[str, Any]:
        """How the weights that answer ``task`` came about."""
        return {**self.experts[task].provenance(), "method": self.kind}

    def keeping(self, inputs: Mapping[str, Adapter]) -> "Ensemble":
        """Itself: its experts are its inputs."""
        return self

    def brief(self) -> str:
        """Nothing: no input has a weight."""
        return ""

    def account(self) -> str:
        """In a line: what it holds."""
        return f"ensemble of {', '.join(self.experts)}, routed by task"

    def described(self) -> dict[str, Any]:
        """What there is to tell of it, as JSON, apart from its base and its role."""
        return {
            "router": self.router,
            "parts": {name: one.described_part() for name, one in self.experts.items()},
            "own": {name: one.described_changes() for name, one in self.experts.items()},
        }


def low_rank(part: Part, base: Base, training: Mapping[str, Any]) -> Adapter:
    """A part as a LoRA whose rank differs from site to site; raises CompositionError for a dense Delta or an extra."""
    if part.extras:
        raise CompositionError(
            f"task {part.task.name!r}",
            f"a {' and a '.join(part.extras)} beside its Deltas",
            "Deltas and shifts alone, for a PEFT folder",
            "keep it as a file of mbert's",
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
    own = {site: rank for site, rank in ranks.items() if rank != usual}
    config = AdapterConfig(
        rank=usual,
        alpha=float(usual),
        targets=exactly(low),
        basis="random",
        rank_pattern=own,
        alpha_pattern={site: float(rank) for site, rank in own.items()},
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
"""A model that one of mbert's own files holds."""
Stored = Composition | FullModel
"""A model that is read from a path."""


def as_merged(model: Model, where: str, found: str, expected: str, remedy: str) -> Merged:
    """``model``, where only a merged one will do; else raises CompositionError with these words."""
    if isinstance(model, Merged):
        return model
    raise CompositionError(where, found, expected, remedy)


def as_composition(model: Model, where: str) -> Composition:
    """``model``, where a whole one will not do; raises CompositionError."""
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
        "name a task that the file answers",
    )
