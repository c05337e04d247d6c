"""The options of adapters, by family. Imports nothing heavy: the command line reads its defaults from here."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from mergekit_bert.errors import TrainingError
from mergekit_bert.option import option
from mergekit_bert.patterns import PatternError, check_patterns, matches_ending
from mergekit_bert.registry import unknown
from mergekit_bert.strict import STRICT, Before, from_pairs

USUAL = "lora"
"""The family that is trained where none is named."""
BASES = ("orthogonal", "random", "avoid")
T = TypeVar("T")
Own = TypeVar("Own", bound="Options")
LowRank = TypeVar("LowRank", bound="LowRankOptions")
_PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_RANK = 2**16
LARGEST_ALPHA = 1e6
LONGEST = 2**16
"""Most virtual tokens."""
PLACES = ("after", "before")
_LONGEST_TARGETS = 2**16
"""In characters; older files list every site of a merge."""


@dataclass(frozen=True)
class Options:
    """The options of a family of adapters: none; families with options define a subclass.

    ``of`` lists mbert's families with these options, for help texts; empty for all. ``recorded`` are options of other
    families that the files of this family record too, always with these values. The properties are
    those that all records have; a family that lets the user choose one has an option (a field) of that name, with a
    default.
    """

    __pydantic_config__: ClassVar = STRICT
    of: ClassVar[str] = ""
    recorded: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        """Raise ArgumentError for an option of another type."""
        from mergekit_bert.arguments import check_types

        check_types(self)

    @property
    def targets(self) -> str:
        """Where a family's sites are: a target set or a pattern (see :mod:`mergekit_bert.encoder.sites`)."""
        return "all-linear"

    @property
    def dropout(self) -> float:
        """The share of its inputs that an adapter beside a linear layer does not see in training."""
        return 0.0

    @property
    def basis(self) -> str:
        """Where the tensor comes from that a basis gives and freezes; ``random``: from nowhere, it is trained."""
        return "random"

    @property
    def rank(self) -> int:
        """The rank of a site's Delta, which is how many rows of a basis it takes; 0 where no option says it."""
        return 0

    def at(self: Own, site: str) -> Own:
        """The options that hold at ``site``."""
        return self

    def shifts(self, tree: Any) -> list[str]:
        """The parameters of an encoder's tree that are trained whole as these options say, beside the family's own."""
        return []

    def renamed(self: Own, names: Mapping[str, str]) -> Own:
        """The same options where sites (the keys of ``names``) have other names."""
        return self

    def facts(self) -> dict[str, str]:
        """What `mbert inspect` shows of them, by the name of the row."""
        return {one.name: str(getattr(self, one.name)) for one in dataclasses.fields(self)}

    def to_json(self) -> dict[str, Any]:
        """For a file's metadata; patterns only where there are any, as pairs, since the first that matches counts."""
        value = {name: one for name, one in dataclasses.asdict(self).items() if name not in _PATTERNS or one}
        value |= {name: [list(pair) for pair in value[name].items()] for name in _PATTERNS if name in value}
        return {**value, **self.recorded}

    @classmethod
    def from_json(cls: type[Own], value: Any) -> Own:
        """The inverse of :meth:`to_json`; raises SchemaError, TrainingError or UnknownNameError for anything else."""
        from mergekit_bert.schema import validate

        if isinstance(value, Mapping):
            for name, expected in cls.recorded.items():
                check_option(value.get(name, expected) == expected, name, value.get(name), f"{expected}")
            value = {name: one for name, one in value.items() if name not in cls.recorded}
        return validate(cls, value)


def check_option(good: bool, name: str, found: object, expected: str) -> None:
    """Raise TrainingError unless the option ``name`` is ``good``."""
    if not good:
        raise TrainingError(f"`{name}`", f"{found}", expected, f"correct `{name}`")


@dataclass(frozen=True)
class LowRankOptions(Options):
    """The options of adapters of linear layers.

    ``targets`` is a target set or a pattern (see :mod:`mergekit_bert.encoder.sites`). LoRA's Delta of a site is
    ``scale · B @ A`` with ``scale = alpha / rank``, or ``alpha / √rank`` if ``rank_stabilized`` (rsLoRA,
    arXiv 2312.03732). ``train_bias`` and ``train_layernorm`` also train what the families ``bitfit`` and ``layernorm``
    do. ``rank_pattern`` and ``alpha_pattern`` map patterns of site names to another rank and alpha, see
    :func:`matching`; the first match counts.
    """

    of: ClassVar[str] = "dora, loha, lora"
    recorded: ClassVar[Mapping[str, Any]] = {"basis": "random"}

    rank: int = option(12, "Rank of each site's Delta.")
    alpha: float = option(32.0, "The Delta is (alpha / rank) · B @ A.")
    rank_stabilized: bool = option(False, "Scale by alpha / √rank (rsLoRA).")
    dropout: float = option(0.0, "Dropout before the adapter.")
    targets: str = option(
        "all-linear", "Layers to adapt: qv, qkv, attention, all-linear, or a pattern for full layer names."
    )
    train_bias: bool = option(False, "Also train the biases of the linear layers.")
    train_layernorm: bool = option(False, "Also train the LayerNorms.")
    rank_pattern: Annotated[Mapping[str, int], Before(from_pairs)] = field(default_factory=dict)
    alpha_pattern: Annotated[Mapping[str, float], Before(from_pairs)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range, ArgumentError for one of another type."""
        super().__post_init__()
        check, rank = check_option, f"a whole number from 1 to {LARGEST_RANK}"
        alpha = f"a positive number up to {LARGEST_ALPHA:g}"
        check(1 <= self.rank <= LARGEST_RANK, "rank", self.rank, rank)
        check(0 < self.alpha <= LARGEST_ALPHA, "alpha", self.alpha, alpha)
        check(0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 to below 1")
        size = len(self.targets)
        check(size <= _LONGEST_TARGETS, "targets", f"{size} characters", f"{_LONGEST_TARGETS} at most")
        for one in self.rank_pattern.values():
            check(type(one) is int and 1 <= one <= LARGEST_RANK, "rank", one, f"{rank} in rank_pattern")
        for other in self.alpha_pattern.values():
            check(0 < other <= LARGEST_ALPHA, "alpha", other, f"{alpha} in alpha_pattern")
        try:
            check_patterns([*self.rank_pattern, *self.alpha_pattern])
        except PatternError as error:
            check(False, "targets", error, "regular expressions in rank_pattern and alpha_pattern")

    def shifts(self, tree: Any) -> list[str]:
        """Biases and norms, where ``train_bias`` and ``train_layernorm`` say so."""
        from mergekit_bert.encoder.sites import shift_names

        return shift_names(tree, self.train_bias, self.train_layernorm)

    @property
    def scale(self) -> float:
        """The factor before ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def at(self: LowRank, site: str) -> LowRank:
        """The options that hold at ``site``."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank, alpha = matching(self.rank_pattern, site, self.rank), matching(self.alpha_pattern, site, self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def renamed(self: LowRank, names: Mapping[str, str]) -> LowRank:
        """The same options where sites (the keys of ``names``) have other names."""
        return dataclasses.replace(
            self,
            rank_pattern=carried(self.rank_pattern, self.rank, names),
            alpha_pattern=carried(self.alpha_pattern, self.alpha, names),
        )

    def facts(self) -> dict[str, str]:
        """Rank and alpha in one row, the targets and the basis, and what a family has beside LoRA's options."""
        usual = {one.name for one in dataclasses.fields(AdapterConfig)}
        stabilized = ", rank-stabilised" if self.rank_stabilized else ""
        return {
            "rank, alpha": f"{self.rank}, {self.alpha:g}{stabilized}",
            "targets": self.targets,
            "basis": self.basis,
            **{name: text for name, text in super().facts().items() if name not in usual},
        }


@dataclass(frozen=True)
class AdapterConfig(LowRankOptions):
    """The options of a LoRA.

    ``basis`` determines ``A``: frozen rows of the orthogonal basis, random and trained, or frozen directions that other
    tasks hardly use (:mod:`mergekit_bert.adapters.avoiding`).
    """

    of: ClassVar[str] = "lora"
    recorded: ClassVar[Mapping[str, Any]] = {}

    basis: str = option(
        "orthogonal",
        "orthogonal (frozen A, for orthoada), random (ordinary LoRA), or avoid (frozen A, see `avoid`).",
    )

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range, ArgumentError for one of another type."""
        super().__post_init__()
        if self.basis not in BASES:
            raise unknown("basis", self.basis, list(BASES))
        several = bool(self.rank_pattern) and self.basis == "orthogonal"
        check_option(
            not several, "basis", "orthogonal with a rank_pattern", "one rank at every site, or `basis=random`"
        )


@dataclass(frozen=True)
class VirtualOptions(Options):
    """The options of virtual tokens: how many each sequence has. They count towards `max_length`."""

    of: ClassVar[str] = "prefix, prompt"

    length: int = option(16, "Virtual tokens in each sequence.")

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range, ArgumentError for one of another type."""
        super().__post_init__()
        check_option(1 <= self.length <= LONGEST, "length", self.length, f"a whole number from 1 to {LONGEST}")


@dataclass(frozen=True)
class PrefixOptions(VirtualOptions):
    """The options of a prefix."""

    of: ClassVar[str] = "prefix"

    projection: bool = option(False, "Train the prefix through an MLP, which is not kept (reparametrisation).")


@dataclass(frozen=True)
class PromptOptions(VirtualOptions):
    """The options of a prompt: its length, and whether it goes before or after a sequence's first token."""

    of: ClassVar[str] = "prompt"

    place: str = option("after", "Where the virtual tokens go: after the first token, or before it as in PEFT.")

    def __post_init__(self) -> None:
        """Raise TrainingError for an option out of its range, ArgumentError for one of another type."""
        super().__post_init__()
        if self.place not in PLACES:
            raise unknown("place", self.place, list(PLACES))


RECORDS: tuple[type[Options], ...] = (AdapterConfig, PrefixOptions, PromptOptions)
"""The records whose options are flags of the command line, each with those that it inherits."""


def matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches ``name``, whole or from a dot on: PEFT's rule."""
    return next((value for pattern, value in patterns.items() if matches_ending(pattern, name)), default)


def carried(patterns: Mapping[str, T], default: T, names: Mapping[str, str]) -> dict[str, T]:
    """``patterns`` of names (the keys of ``names``) as patterns of their new names: whole names, where they must be.

    They are put in the order of JSON's keys, since the first one that matches counts.
    """
    exact = {new: matching(patterns, old, default) for old, new in names.items()}
    kept = dict(sorted(patterns.items()))
    if all(matching(kept, new, default) == value for new, value in exact.items()):
        return kept
    return {new: value for new, value in sorted(exact.items()) if value != default}
