"""What a run makes small. Ordinary training and every merge that learns is an Objective, and one loop runs them all.

An Objective knows models and rows; the loop knows neither. It holds no place in the run: that is the loop's
:class:`~mergekit_bert.training.checkpoint.Progress`.
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
    """A loss, the parameters that it moves, and what decides the run.

    ``title`` names the run on the progress bar and in errors. ``run`` describes all that decides it: a checkpoint
    must match. ``generators`` are those whose state a checkpoint keeps. The gradient's norm is cut to ``clip``.

    With ``epoch`` above 0, :meth:`score` is asked after every so many steps, the parameters of the best score are
    kept, and the run stops early after ``patience`` scores without a better one.

    ``error`` is what the loop raises; ``if_diverged`` and ``if_broken`` are its advice for a loss that is not finite
    and for a checkpoint that cannot be read.
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
        """Whether the checkpoint at ``path``, of the run described by ``run``, is of this one; if not, begin anew.

        Raises MbertError where another run's checkpoint must not be replaced.
        """

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear up over ``warmup`` steps, linear down to zero at ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)

    def score(self) -> float:
        """How good the parameters are on held-out rows (higher is better); asked only with an ``epoch``."""
        raise NotImplementedError

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
