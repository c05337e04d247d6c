"""What an adapter is asked to be. Imports nothing heavy: the command line reads its defaults from here."""

import math
from dataclasses import dataclass

from mergekit_bert.errors import TrainingError
from mergekit_bert.registry import unknown

BASES = ("orthogonal", "random")


@dataclass(frozen=True)
class AdapterConfig:
    """The options of an adapter.

    ``targets`` is a target set or a pattern (see :mod:`mergekit_bert.encoder.sites`). The Delta of a site is
    ``scale · B @ A`` with ``scale = alpha / rank``, or ``alpha / √rank`` if ``rank_stabilized`` (rsLoRA,
    arXiv 2312.03732). ``basis`` says where ``A`` comes from: frozen rows of the orthogonal basis, or random and
    trained.
    """

    rank: int = 8
    alpha: float = 32.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    targets: str = "all-linear"
    basis: str = "orthogonal"
    train_bias: bool = False
    train_layernorm: bool = False

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range."""

        def check(good: bool, option: str, found: object, expected: str) -> None:
            if not good:
                raise TrainingError(f"--{option}", f"{found}", expected, f"correct --{option}")

        check(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        check(math.isfinite(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a positive number")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 to below 1")
        if self.basis not in BASES:
            raise unknown("basis", self.basis, list(BASES))

    @property
    def scale(self) -> float:
        """The factor before ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
