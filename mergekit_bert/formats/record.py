"""The schema of the metadata of merged and ensemble files: every field with its type and bounds."""

from typing import Annotated, Literal

from pydantic import Field

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.record import AdapterRecord, BodyRecord, OptionsOfType, PartRecord, TrainingRecord
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.encoder.load import Base
from mergekit_bert.schema import Count, Finite, Name, Plain, Rank, Schema, Shape, Size


class DeltaRecord(Schema):
    """A Delta: the size of its site, and its rank (None: dense)."""

    size: Size
    rank: Rank | None


class PatchRecord(Schema):
    """Deltas by site, and the shapes of the shifts by parameter."""

    sites: dict[Name, DeltaRecord]
    shifts: dict[Name, Shape]


class OwnRecord(PatchRecord):
    """The task-specific parameters of a task: Deltas, shifts, and the sizes of its extras by name."""

    extras: dict[Name, Shape] = Field(default_factory=dict, min_length=1)


class RowsRecord(Schema):
    """Rows whose labels a step has read, and the cross-validated effect of refitting a head on them."""

    fingerprint: Name
    count: Count | None = None
    texts: list[Annotated[str, Field(pattern=r"\A[0-9a-f]{16}\z")]] = Field(default_factory=list)
    held_out_in_training: Count | None = None
    folds: Count | None = None
    before: Finite | None = None
    after: Finite | None = None
    strength: Finite | None = None


class LostRecord(Schema):
    """The share of ``‖Δ‖²`` lost by compressing to a rank, in total and at each site."""

    rank: Count
    in_all: Finite
    sites: dict[Name, Finite]


class SearchRecord(Schema):
    """A search: its rows, what was searched, all evaluations, and the index of the best one."""

    over: list[Name]
    optimizer: Name
    rows: dict[Name, RowsRecord]
    evaluations: list[dict[Name, Finite | dict[Name, Finite]]]
    best: Count


class HeadsRecord(Schema):
    """Heads refitted after the merge."""

    rows: dict[Name, RowsRecord]


class ScalesRecord(Schema):
    """Factors of the merged Deltas."""

    sites: dict[Name, Finite]


class CalibrationRecord(Schema):
    """What was calibrated after the merge."""

    heads: HeadsRecord | None = None
    scales: ScalesRecord | None = None


class TraceRecord(Schema):
    """What was learned, lost and calibrated in a merge, and the same for inputs that are merged models."""

    learned: dict[Name, Plain] | None = None
    lost: LostRecord | None = None
    inputs: "dict[Name, TraceRecord] | None" = None
    layers: dict[Name, dict[Name, Finite]] | None = None
    search: SearchRecord | None = None
    calibrated: CalibrationRecord | None = None
    heads: HeadsRecord | None = None
    scales: ScalesRecord | None = None


class PrivateRecord(Schema):
    """The tasks' residuals of shared Deltas and shifts: the largest rank, and the bytes of all."""

    rank: Rank
    bytes: Count


class MergedRecord(PatchRecord):
    """A merged model."""

    method: Name
    weights: Annotated[dict[Name, Finite], Field(min_length=1)]
    base: Base
    order: list[Name]
    own: dict[Name, OwnRecord]
    parts: dict[Name, PartRecord]
    recipe: Recipe
    trace: TraceRecord
    experts: dict[Name, AdapterRecord]
    kept: list[Name]
    private: PrivateRecord | None = None
    bodies: Annotated[dict[Name, BodyRecord], Field(min_length=1)] | None = None


class FolderRecord(Schema):
    """The part of a model folder's record about the adapter or training that its weights came from."""

    type: Name | None = None
    config: OptionsOfType | None = None
    basis: BasisRows | None = None
    training: TrainingRecord | None = None
    scores: dict[Name, Finite | None] | None = None


class EnsembleRecord(Schema):
    """An ensemble: every adapter's record, their order, and the router."""

    router: Literal["task"]
    order: Annotated[list[Name], Field(min_length=1)]
    experts: dict[Name, AdapterRecord]
