"""Models that are patches of one encoder: adapters, and all that is composed of them."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.patch import Part, Patch, check_part
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.forward import scaled
from mergekit_bert.encoder.load import Base, Encoder, check_base
from mergekit_bert.encoder.ready import Ready
from mergekit_bert.errors import ModelFileError
from mergekit_bert.model_methods import CompositionMethods


@runtime_checkable
class _Model(Protocol):
    """What a patched model says of itself; from this all else here follows."""

    @property
    def tasks(self) -> tuple[Task, ...]: ...
    @property
    def base(self) -> Base: ...
    @property
    def shared(self) -> Patch: ...
    def own_part(self, task: str) -> Part: ...
    def part(self, task: str) -> Part: ...
    def on(self, encoder: Encoder) -> Any: ...


class Patched(CompositionMethods):
    """A model that changes one encoder: ``shared`` for all its tasks, and ``own_part`` for each."""

    stands_alone = False
    """It answers on its base alone."""

    @property
    def shared(self) -> Patch:
        """What all tasks share: nothing, unless a model says otherwise."""
        return Patch()

    def part(self: _Model, task: str) -> Part:
        """What it takes to answer ``task`` (one of its own, which the caller checks): its own part and the shared."""
        return self.own_part(task).over(self.shared)

    def seen(self) -> list[tuple[str, str, str, frozenset[str]]]:
        """The rows whose labels it has seen since its adapters were trained: none, unless a model says otherwise."""
        return []

    def sha256(self) -> str | None:
        """SHA-256 (hex) that it is known by among adapters; None for other models, which their file alone tells."""
        return None

    def places(self: _Model, folder: Path) -> dict[str, Path]:
        """Where in ``folder`` the PEFT folder of each task lies."""
        return {task.name: folder / task.name for task in self.tasks}

    def answering(self: _Model, encoder: Encoder | None, where: str) -> "Folded":
        """The model on ``encoder``, its base; raises ModelFileError unless they fit. ``where`` is what it is called."""
        if encoder is None:
            raise ModelFileError(where, "no encoder", f"the base {self.base.name!r}", "load it with load_encoder")
        check_base(where, self.base, encoder)
        model: _Model = self.on(encoder)
        for task in model.tasks:
            check_part(f"{where}, task {task.name!r}", model.part(task.name), encoder)
        return Folded(model, encoder)


class Folded:
    """A patched model on its encoder: what its tasks share is folded into the weights once, each task's own on top."""

    def __init__(self, model: _Model, encoder: Encoder) -> None:
        """Nothing is folded before it is asked for."""
        self.model, self.encoder = model, encoder

    @cached_property
    def shared(self) -> Encoder:
        """The encoder with what all tasks share."""
        patch = self.model.shared
        return fold(self.encoder, patch) if patch.deltas or patch.shifts else self.encoder

    def own_parts(self) -> list[Part]:
        """What each task adds to :attr:`shared`, in the order of the tasks."""
        return [self.model.own_part(task.name) for task in self.model.tasks]

    def ready(self, task: Task) -> Ready:
        """The classifier of ``task``."""
        part = self.model.own_part(task.name)
        model = classifier(fold(self.shared, part), task, part.head)
        return Ready(model, partial(part.tokens, self.encoder), part.max_length, partial(scaled, task=task))
