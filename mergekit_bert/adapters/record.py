"""What the metadata of an adapter file may say: every field with its type and bounds, nothing beside them."""

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


def options_of(kind: str | None, value: Any) -> Options:
    """``value``, as a file keeps them, as the options of the family ``kind``; as LoRA's where that is none.

    Raises UnknownNameError where there is no such family and they are not LoRA's.
    """
    try:
        record = FAMILIES.get(kind or USUAL).options
    except UnknownNameError as error:
        try:
            return AdapterConfig.from_json(value)
        except (MbertError, ValueError):
            raise error from None
    return record.from_json(value)


OptionsOfType = Annotated[Options, BeforeValidator(lambda value, info: options_of(info.data.get("type"), value))]
"""An adapter's options, in a record that says its ``type`` before them."""


def _known(statistic: str) -> str:
    """``statistic``, a kind of statistics; raises UnknownNameError."""
    check_kinds([statistic])
    return statistic


class StatisticRecord(Schema):
    """A statistic's shape, how many inputs or texts it is of, and the share that its rank cost."""

    shape: Size
    count: Count
    lost: Annotated[Finite, Field(ge=0)]


class TrainingRecord(Schema):
    """Where an adapter came from. Each kind of training writes a part of this, and so does a merge that becomes one."""

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
    """What a merge keeps of an adapter's record, and the SHA-256 of its file (empty for a whole checkpoint)."""

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
    """What a merge keeps of the record of an adapter without a head."""

    type: Name
    config: OptionsOfType
    training: TrainingRecord
    sha256: Sha256


class AdapterRecord(Schema):
    """An adapter's whole record."""

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
