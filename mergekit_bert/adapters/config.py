"""What an adapter is asked to be. Imports nothing heavy: the command line reads its defaults from here."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mergekit_bert.errors import TrainingError
from mergekit_bert.option import option
from mergekit_bert.registry import unknown

BASES = ("orthogonal", "random", "avoid")
T = TypeVar("T")
PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterConfig:
    """The options of an adapter.

    ``targets`` is a target set or a pattern (see :mod:`mergekit_bert.encoder.sites`). The Delta of a site is
    ``scale · B @ A`` with ``scale = alpha / rank``, or ``alpha / √rank`` if ``rank_stabilized`` (rsLoRA,
    arXiv 2312.03732). ``basis`` says where ``A`` comes from: frozen rows of the orthogonal basis, random and trained,
    or frozen directions that other tasks hardly use (:mod:`mergekit_bert.adapters.avoiding`). ``rank_pattern`` and
    ``alpha_pattern`` give sites a rank and an alpha of their own, by patterns of their names, see :func:`matching`.
    """

    rank: int = option(12, "Rank of each site's Delta.")
    alpha: float = option(32.0, "The Delta is (alpha / rank) · B @ A.")
    rank_stabilized: bool = option(False, "Scale by alpha / √rank (rsLoRA).")
    dropout: float = option(0.0, "Dropout before the adapter.")
    targets: str = option("all-linear", "Sites: qv, qkv, attention, all-linear, or a pattern of whole layer names.")
    basis: str = option(
        "orthogonal",
        "orthogonal (frozen A, for orthoada), random (ordinary LoRA), or avoid (frozen A, see --avoid).",
    )
    train_bias: bool = option(False, "Also train the biases of the linear layers.")
    train_layernorm: bool = option(False, "Also train the LayerNorms.")
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

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
        for rank in self.rank_pattern.values():
            check(type(rank) is int and rank >= 1, "rank", rank, "a whole number of at least 1 in rank_pattern")
        for alpha in self.alpha_pattern.values():
            check(math.isfinite(alpha) and alpha > 0, "alpha", alpha, "a positive number in alpha_pattern")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check(_compiles(pattern), "targets", repr(pattern), "a regular expression in rank_pattern or alpha_pattern")
        several = bool(self.rank_pattern) and self.basis == "orthogonal"
        check(not several, "basis", "orthogonal with a rank_pattern", "one rank at every site, or --basis random")

    @property
    def scale(self) -> float:
        """The factor before ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def at(self, site: str) -> "AdapterConfig":
        """The options that hold at ``site``."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank, alpha = matching(self.rank_pattern, site, self.rank), matching(self.alpha_pattern, site, self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def to_json(self) -> dict[str, Any]:
        """For a file's metadata; patterns only where there are any, as pairs, since the first that matches counts."""
        value = {name: one for name, one in dataclasses.asdict(self).items() if name not in PATTERNS or one}
        return value | {name: [list(pair) for pair in value[name].items()] for name in PATTERNS if name in value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterConfig":
        """The inverse of :meth:`to_json`; raises TypeError, ValueError or TrainingError for anything else."""
        patterns: dict[str, Any] = {name: dict(value[name]) for name in PATTERNS if name in value}
        return cls(**{**value, **patterns})


def matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches ``name``, whole or from a dot on: PEFT's rule."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, default)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(rf"({pattern})$")
    except (re.error, TypeError):
        return False
    return True
