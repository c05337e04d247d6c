"""PEFT adapter folders: their files, read strictly before the base is known.

Such a folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. A folder that mbert wrote has
``mbert.json`` besides, for what PEFT has no place for. Nothing in such a folder tells whether it is whole, so all is
checked that can be: here each file by itself, in :mod:`mergekit_bert.formats.peft_reading` against the base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import LARGEST_ALPHA, LARGEST_RANK
from mergekit_bert.adapters.record import OptionsOfType, TrainingRecord
from mergekit_bert.data.kind import HubFields
from mergekit_bert.data.task import Task
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.encoder.folder import RECORD
from mergekit_bert.encoder.load import Base
from mergekit_bert.errors import MbertError, ModelFileError
from mergekit_bert.files import file_fingerprint, fingerprint
from mergekit_bert.patterns import PatternError, check_patterns, matches
from mergekit_bert.schema import Finite, Length, Name, Plain, Schema, SchemaError, Sha256, Text, Words, validate
from mergekit_bert.tensorfile import StoredTensors

T = TypeVar("T")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODEL_CONFIG = "config.json"
_PICKLE = "adapter_model.bin"
FORMAT = 1
PREFIX = "base_model.model."
AGAIN = "save it with PEFT again"
_LARGEST_FILE = 8 * 2**20
"""Bytes of either JSON file."""
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""

_Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=LARGEST_ALPHA)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class PeftConfig(Schema):
    """The settings that are heeded, or that change nothing in a trained adapter; those that all kinds have.

    What may be None is what PEFT itself takes None for; ``target_modules`` as a text is a pattern of whole names, as a
    list their endings.
    """

    title: ClassVar[str]

    peft_type: Name
    peft_version: Text | None = None
    task_type: Text | None = None
    auto_mapping: Plain = None
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    target_modules: Words | None = None
    exclude_modules: Words | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Words | None = None
    modules_to_save: Annotated[list[Name], Field(max_length=1000)] | None = None
    inference_mode: bool | None = None
    runtime_config: Plain = None

    def targets(self, module: str) -> bool | None:
        """Whether LoRA belongs at the linear layer ``module``, by PEFT's rules; None where they leave it open."""
        if self.target_modules is None:
            return None
        saved = any(f".{one}." in f".{module}." for one in self.modules_to_save or ())
        if saved or _named(self.exclude_modules or (), module):
            return False
        every = isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        found = every or _named(self.target_modules, module)
        return None if found and self.layers_to_transform not in (None, []) else found


class _LowRankConfig(PeftConfig):
    r: _Rank
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None


class LoraConfig(_LowRankConfig):
    """LoRA, rsLoRA and DoRA."""

    title: ClassVar[str] = "LoRA"

    lora_alpha: _Alpha = 8.0
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_dropout: _Share | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | Text | None = None
    eva_config: Plain = None
    megatron_core: Text | None = None
    qalora_group_size: int | None = None


class LohaConfig(_LowRankConfig):
    """LoHa; its own dropouts drop nothing of a trained adapter."""

    title: ClassVar[str] = "LoHa"

    alpha: _Alpha = 8.0
    rank_dropout: _Share | None = None
    module_dropout: _Share | None = None
    use_effective_conv2d: bool | None = None
    init_weights: bool | None = None


class LNTuningConfig(PeftConfig):
    """Norms, and whatever else is targeted, trained whole."""

    title: ClassVar[str] = "LayerNorm tuning"


KINDS: Mapping[str, type[PeftConfig]] = {"LORA": LoraConfig, "LOHA": LohaConfig, "LN_TUNING": LNTuningConfig}
"""The settings of each ``peft_type`` that can be read."""


def _named(words: str | list[str] | tuple[()], module: str) -> bool:
    """PEFT's rule: a pattern of whole names, or names and their endings."""
    return matches(words, module) if isinstance(words, str) else any(f".{module}".endswith(f".{one}") for one in words)


class AdapterRecord(Schema):
    """What ``mbert.json`` says of the adapter: what it was before it was written as a PEFT folder.

    Older ones name no type, and have the options of a LoRA or a DoRA.
    """

    type: Name | None = None
    config: OptionsOfType
    basis: BasisRows | None
    training: TrainingRecord
    scores: dict[Name, Finite]


class _Record(Schema):
    """``mbert.json``."""

    format: Literal[1]
    kind: Literal["peft"]
    task: Task
    max_length: Length
    base: Base
    sha256: Sha256
    adapter: AdapterRecord


class _LabelRecord(Schema):
    """What is read of transformers' ``config.json``."""

    id2label: dict[Annotated[str, Field(pattern=r"\A[0-9]{1,5}\z")], Name] = Field(default_factory=dict)
    problem_type: Text = ""


@dataclass(frozen=True)
class PeftFolder:
    """A folder as read, before its base is known; tensors are read when they are asked for.

    ``task``, ``max_length`` and ``base`` come from ``mbert.json``, None where there is none; ``written`` is the rest
    of it, where the folder is still as it was written.
    """

    path: Path
    config: PeftConfig
    tensors: StoredTensors
    task: Task | None
    max_length: int | None
    base: Base | None
    written: AdapterRecord | None

    @property
    def label_fields(self) -> HubFields | None:
        """What a ``config.json`` beside the adapter says of the labels; None where there is none, or it says nothing.

        PEFT writes no such file, but some people put the whole model's beside the adapter.
        """
        if not (self.path / _MODEL_CONFIG).is_file():
            return None
        value = _read(self.path / _MODEL_CONFIG, "remove it")
        known = {key: value[key] for key in _LabelRecord.model_fields if value.get(key) is not None}
        where = str(self.path / _MODEL_CONFIG)
        record = _validated(_LabelRecord, known, where, "labels as transformers writes them", "remove it")
        return HubFields({int(place): label for place, label in record.id2label.items()}, record.problem_type, value)

    @property
    def base_name(self) -> str | None:
        """The name of its base, as far as the folder knows."""
        return self.base.name if self.base else self.config.base_model_name_or_path


def is_peft(path: Path) -> bool:
    """Whether ``path`` is a PEFT adapter folder."""
    return (path / CONFIG).is_file()


def open_peft(path: Path) -> PeftFolder:
    """Read the folder's files; raises ModelFileError for what mbert cannot use, whatever the base is."""
    config = _config(path / CONFIG)
    if not (path / WEIGHTS).exists() and (path / _PICKLE).exists():
        raise ModelFileError(
            str(path),
            f"weights in a pickle, {_PICKLE}, which can run code",
            WEIGHTS,
            "if you trust it, load it with PEFT and save it again: save_pretrained writes safetensors",
        )
    if not (path / WEIGHTS).is_file():
        found = "no regular file" if (path / WEIGHTS).exists() else "no such file"
        raise ModelFileError(str(path / WEIGHTS), found, "weights in safetensors", "check the path")
    tensors = StoredTensors(path / WEIGHTS)
    if not (path / RECORD).exists():
        return PeftFolder(path, config, tensors, None, None, None, None)
    value = _read(path / RECORD, "remove it")
    record = _validated(_Record, value, str(path / RECORD), "a record as mbert writes it", "remove it")
    written = record.adapter if record.sha256 == identity(path) else None
    return PeftFolder(path, config, tensors, record.task, record.max_length, record.base, written)


def identity(path: Path) -> str:
    """SHA-256 (hex) of the two files that PEFT writes."""
    return fingerprint([file_fingerprint(path / name) for name in (CONFIG, WEIGHTS)])


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_mapping(path, _LARGEST_FILE)
    except OSError as error:
        raise ModelFileError(str(path), str(error.strerror).lower(), "a JSON file", remedy) from error
    except DocumentError as error:
        line = f", line {error.line}" if error.line else ""
        raise ModelFileError(f"{path}{line}", f"{error}", "names and values in JSON", remedy) from error


def _validated(kind: Callable[..., T], value: Mapping[str, Any], where: str, expected: str, remedy: str) -> T:
    try:
        return validate(kind, value)
    except (SchemaError, MbertError) as error:
        raise ModelFileError(where, f"broken ({error})", expected, remedy) from error


def _config(path: Path) -> PeftConfig:
    """The settings of an adapter that mbert can use."""
    value, where = _read(path, AGAIN), str(path)

    def check(good: bool, key: str, expected: str, remedy: str) -> None:
        if not good:
            raise ModelFileError(where, f"{key} is {value.get(key)!r}", expected, remedy)

    kinds = f"{', '.join(KINDS)}: no other kind is a change of weights that mbert knows"
    kind, named = value.get("peft_type"), "an adapter of such a kind"
    check(isinstance(kind, str) and kind in KINDS, "peft_type", f"one of {kinds}", f"give {named}")
    settings = KINDS[str(kind)]
    for key in sorted(value.keys() - settings.model_fields.keys()):
        check(not value[key], key, f"{settings.title} without further settings", "merge it with PEFT")
    check(value.get("init_lora_weights", True) in _INITS, "init_lora_weights",
          "an initialisation that leaves the base's weights as they are",
          "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)")  # fmt: skip
    known = {key: one for key, one in value.items() if key in settings.model_fields}
    config = _validated(settings, known, where, f"settings of a {settings.title}", AGAIN)
    try:
        for words in (config.target_modules, config.exclude_modules):
            check_patterns([words] if isinstance(words, str) else [])
        if isinstance(config, _LowRankConfig):
            check_patterns([*(config.rank_pattern or ()), *(config.alpha_pattern or ())])
    except PatternError as error:
        raise ModelFileError(where, f"broken ({error})", "patterns of names", AGAIN) from error
    return config
