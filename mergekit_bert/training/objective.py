"""The interface of objectives: ordinary training and every merge that learns. One loop minimises them all.

An Objective has models and rows, which the loop does not depend on. It does not store the progress of the run: that is
the loop's :class:`~mergekit_bert.training.checkpoint.Progress`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.errors import MbertError
from mergekit_bert.files import Json

Term = Callable[[], Float[Tensor, ""]]
"""A part of a step's loss. The loop computes it and frees its graph before the next, which bounds memory."""


class Objective(ABC):
    """A loss, the trained parameters, and the description of the run.

    ``title`` names the run on the progress bar and in errors. ``run`` describes everything that determines its result;
    a checkpoint must match it. ``generators`` are those whose state is in a checkpoint. The norm of the gradient is
    clipped to ``clip``.

    With ``epoch`` above 0, :meth:`score` is called after each ``epoch`` steps, the parameters with the best score are
    kept, and the run stops early after ``patience`` scores without improvement.

    ``error`` is the exception that the loop raises; ``if_diverged`` and ``if_broken`` are the remedies in its message
    for a loss that is not finite and for a checkpoint that cannot be read.
    """

    error: ClassVar[type[MbertError]]
    if_diverged: ClassVar[str]
    if_broken: ClassVar[str]

    title: str
    parameters: Mapping[str, nn.Parameter]
    run: Mapping[str, Json]
    steps: int
    warmup: int
    clip: float = 1.0
    generators: Mapping[str, torch.Generator] = MappingProxyType({})
    epoch: int = 0
    patience: int = 0
    score_name: str = ""

    @abstractmethod
    def terms(self, step: int) -> Iterable[Term]:
        """The terms whose sum is the loss of ``step``: a function of the step and the generators alone."""

    @abstractmethod
    def groups(self) -> Sequence[dict[str, Any]]:
        """The parameters as AdamW takes them, in groups: ``params``, the peak ``lr`` and, if any, ``weight_decay``."""

    @abstractmethod
    def continues(self, path: Path, run: Mapping[str, Json]) -> bool:
        """Whether the checkpoint at ``path``, of the run described by ``run``, belongs to this run; if not, start anew.

        Raises MbertError if the checkpoint belongs to another run and must not be replaced.
        """

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear up over ``warmup`` steps, linear down to zero at ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)

    def score(self) -> float:
        """The score of the parameters on held-out rows (higher is better); called only if ``epoch`` is set."""
        raise NotImplementedError

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
