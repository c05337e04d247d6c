"""What an adapter is asked to be. Imports nothing heavy: the command line reads its defaults from here."""

import math
from dataclasses import dataclass

from mergekit_bert.errors import TrainingError
from mergekit_bert.option import option
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

    rank: int = option(12, "Rank of each site's Delta.")
    alpha: float = option(32.0, "The Delta is (alpha / rank) · B @ A.")
    rank_stabilized: bool = option(False, "Scale by alpha / √rank (rsLoRA).")
    dropout: float = option(0.0, "Dropout before the adapter.")
    targets: str = option("all-linear", "Sites: qv, qkv, attention, all-linear, or a pattern of whole layer names.")
    basis: str = option("orthogonal", "orthogonal (frozen A, for orthoada) or random (ordinary LoRA).")
    train_bias: bool = option(False, "Also train the biases of the linear layers.")
    train_layernorm: bool = option(False, "Also train the LayerNorms.")

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range."""

        def check(good: bool, name: str, found: object, expected: str) -> None:
            if not good:
                raise TrainingError(f"--{name}", f"{found}", expected, f"correct --{name}")

        check(self.rank >= 1, "rank", self.rank, "a whole number of at least 1")
        check(math.isfinite(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a positive number")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 to below 1")
        if self.basis not in BASES:
            raise unknown("basis", self.basis, list(BASES))

    @property
    def scale(self) -> float:
        """The factor before ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
