"""The schema of the metadata of adapter files: every field with its type and bounds."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import USUAL, AdapterConfig, Options
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.statistics import check_kinds
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Base
from mergekit_bert.errors import MbertError, UnknownNameError
from mergekit_bert.schema import Count, Finite, Length, Name, Schema, Seed, Sha256, Shape, Size


def options_of(family: str | None, value: Any) -> Options:
    """Recorded options as those of ``family``; as LoRA's if there is no such family.

    Raises UnknownNameError if there is no such family and they are not LoRA's options.
    """
    try:
        record = FAMILIES.get(family or USUAL).options
    except UnknownNameError as error:
        try:
            return AdapterConfig.from_json(value)
        except (MbertError, ValueError):
            raise error from None
    return record.from_json(value)


OptionsOfType = Annotated[Options, BeforeValidator(lambda value, info: options_of(info.data.get("type"), value))]
"""An adapter's options, in a record with the field ``type`` before them."""


def _known(statistic: str) -> str:
    """``statistic``; raises UnknownNameError unless there is one of this name."""
    check_kinds([statistic])
    return statistic


class StatisticRecord(Schema):
    """A statistic's shape, the number of inputs or texts, and the share lost by compressing it."""

    shape: Size
    count: Count
    lost: Annotated[Finite, Field(ge=0)]


class TrainingRecord(Schema):
    """The provenance of an adapter. Training, imports and merges saved as adapters each write some of these fields."""

    examples: Count | None = None
    held_out: Count | None = None
    truncated: Count | None = None
    epochs_done: Count | None = None
    best_epoch: Count | None = None
    steps: Count | None = None
    optimizer: Name | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    lr: Finite | None = None
    head_lr: Finite | None = None
    warmup: Finite | None = None
    weight_decay: Finite | None = None
    clip: Finite | None = None
    balance: bool | None = None
    head: Name | None = None
    head_dropout: Finite | None = None
    max_length: Length | None = None
    hold_out: Finite | None = None
    hold_out_limit: Count | None = None
    patience: Count | None = None
    seed: Seed | None = None
    precision: Name | None = None
    threads: Count | None = None
    data: Name | None = None
    versions: dict[Name, Name] | None = None
    avoid: list[Name] | None = None
    peft_version: Name | None = None
    use_dora: bool | None = None
    method: Name | None = None
    weights: dict[Name, Finite] | None = None


class PartRecord(Schema):
    """The part of an adapter's record stored in a merge, and the SHA-256 of its file (empty for checkpoints)."""

    type: Name
    config: OptionsOfType
    task: Task
    max_length: Length
    head: dict[Name, Shape]
    basis: BasisRows | None
    training: TrainingRecord
    scores: dict[Name, Finite]
    sha256: Annotated[str, Field(pattern=r"\A([0-9a-f]{64})?\z")]


class BodyRecord(Schema):
    """The part of the record of an adapter without a head that is stored in a merge."""

    type: Name
    config: OptionsOfType
    training: TrainingRecord
    sha256: Sha256


class AdapterRecord(Schema):
    """The complete record of an adapter."""

    type: Name
    config: OptionsOfType
    task: Task
    base: Base
    max_length: Length
    sites: dict[Name, Size]
    shifts: dict[Name, Shape]
    head: dict[Name, Shape]
    basis: BasisRows | None
    training: TrainingRecord
    scores: dict[Name, Finite]
    statistics: dict[
        Annotated[str, AfterValidator(_known)], Annotated[dict[Name, StatisticRecord], Field(min_length=1)]
    ] = Field(default_factory=dict, min_length=1)
    extras: dict[Name, Shape] = Field(default_factory=dict, min_length=1)
