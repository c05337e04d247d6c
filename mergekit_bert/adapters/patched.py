"""Models that are patches of one encoder: adapters and their compositions."""

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
    """The interface that patched models implement."""

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
    """It predicts only on its base."""

    @property
    def shared(self) -> Patch:
        """The parameters that all tasks share; none by default."""
        return Patch()

    def part(self: _Model, task: str) -> Part:
        """Everything needed to predict ``task``: shared and task-specific parameters."""
        return self.own_part(task).over(self.shared)

    def seen(self) -> list[tuple[str, str, str, frozenset[str]]]:
        """The rows whose labels were read since its adapters were trained; none by default."""
        return []

    def sha256(self) -> str | None:
        """SHA-256 of the adapter; None for other models."""
        return None

    def places(self: _Model, folder: Path) -> dict[str, Path]:
        """The path of each task's PEFT folder in ``folder``."""
        return {task.name: folder / task.name for task in self.tasks}

    def answering(self: _Model, encoder: Encoder | None, where: str) -> "Folded":
        """The model on ``encoder``, its base; raises ModelFileError unless they fit. ``where`` is for messages."""
        if encoder is None:
            raise ModelFileError(where, "no encoder", f"the base {self.base.name!r}", "load it with load_encoder")
        check_base(where, self.base, encoder)
        model: _Model = self.on(encoder)
        for task in model.tasks:
            check_part(f"{where}, task {task.name!r}", model.part(task.name), encoder)
        return Folded(model, encoder)


class Folded:
    """A patched model on its encoder: shared parameters are folded in once, task-specific ones per task."""

    def __init__(self, model: _Model, encoder: Encoder) -> None:
        """Parameters are folded on first use."""
        self.model, self.encoder = model, encoder

    @cached_property
    def shared(self) -> Encoder:
        """The encoder with the parameters that all tasks share."""
        patch = self.model.shared
        return fold(self.encoder, patch) if patch.deltas or patch.shifts else self.encoder

    def own_parts(self) -> list[Part]:
        """The task-specific parameters, in the order of the tasks."""
        return [self.model.own_part(task.name) for task in self.model.tasks]

    def ready(self, task: Task) -> Ready:
        """The classifier of ``task``."""
        part = self.model.own_part(task.name)
        model = classifier(fold(self.shared, part), task, part.head)
        return Ready(model, partial(part.tokens, self.encoder), part.max_length, partial(scaled, task=task))
