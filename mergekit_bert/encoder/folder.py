"""Plain Hugging Face folders: a whole model for one task, which ``AutoModelForSequenceClassification`` loads as it is.

Beside transformers' files lies ``mbert.json``: the task, the base and the provenance, so that mbert can score it too.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.documents import DocumentError, read_mapping
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import bare_head, head_shapes
from mergekit_bert.encoder.forward import scaled
from mergekit_bert.encoder.head import Classifier, head_of
from mergekit_bert.encoder.heads.native import NativeClassifier
from mergekit_bert.encoder.load import Base, Encoder, longest, try_out
from mergekit_bert.encoder.pooled import HEAD, MODULES, POOLING
from mergekit_bert.encoder.pretrained import one_line, open_pretrained, quiet_transformers, told_as
from mergekit_bert.encoder.ready import Ready
from mergekit_bert.errors import CompositionError, MbertError, ModelFileError
from mergekit_bert.files import atomic_folder, write_json
from mergekit_bert.hardware import default_device
from mergekit_bert.model_methods import ModelMethods, summary
from mergekit_bert.schema import Finite, Length, Name, Plain, Schema, SchemaError, Sha256, Shape, validate
from mergekit_bert.tensorfile import read_plain_tensors, tensors_in_any_order

RECORD = "mbert.json"
FILES = (
    *(RECORD, "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "*.model", HEAD, MODULES, f"{POOLING}/config.json"),
)
"""Patterns of the names in such a folder."""
_FORMAT = 1


class _Seen(Schema):
    """Rows whose labels a step of the merge has seen."""

    step: Name
    fingerprint: Name
    texts: list[Annotated[str, Field(pattern=r"\A[0-9a-f]{16}\z")]]


class _Record(Schema):
    """The layout of ``mbert.json``: what every folder says, and what a merge or an adapter adds."""

    format: int
    kind: Name = "full"
    task: Task
    base: Base
    max_length: Length
    training: dict[Name, Plain] = Field(default_factory=dict)
    scores: dict[Name, Finite | None] = Field(default_factory=dict)
    seen: list[_Seen] = Field(default_factory=list)
    method: Name = ""
    weights: dict[Name, Finite] = Field(default_factory=dict)
    type: Name = ""
    config: dict[Name, Plain] = Field(default_factory=dict)
    head: dict[Name, Shape] = Field(default_factory=dict)
    basis: dict[Name, Plain] | None = None
    sha256: Sha256 | Literal[""] = ""


@dataclass(frozen=True, repr=False)
class FullModel(ModelMethods):
    """A model folder as read: ``record`` is its ``mbert.json``."""

    stands_alone = True
    """It answers without its base."""
    needs_base = False

    path: Path
    task: Task
    max_length: int
    base: Base
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        """One line."""
        return summary("FullModel", self.tasks, f"base {self.base.name!r}", str(self.path))

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The one task it answers."""
        return (self.task,)

    def on(self, encoder: Encoder) -> "FullModel":
        """Itself: it is whole."""
        return self

    def answering(self, encoder: Encoder | None, where: str) -> "Loaded":
        """The model, to be loaded when it is first asked; ``where`` is what messages call it."""
        return Loaded(self, where)

    def role(self) -> str:
        """What it is called in tables: ``full``, or ``dense`` for an export."""
        return str(self.record.get("kind", "full"))

    def sha256(self) -> str | None:
        """No adapter is known by it."""
        return None

    def sha256_of(self, task: str) -> str | None:
        """No adapter answers ``task``."""
        return None

    def described(self) -> dict[str, Any]:
        """What there is to tell of it, as JSON, apart from its base and its role."""
        return {"parts": {self.task.name: dict(self.record)}}

    def seen(self) -> list[tuple[str, str, str, frozenset[str]]]:
        """The rows whose labels were used by its merge, from the record; none for folders of older versions."""
        return [
            (str(rows["step"]), self.task.name, str(rows["fingerprint"]), frozenset(map(str, rows["texts"])))
            for rows in self.record.get("seen", ())
        ]


@dataclass(frozen=True)
class Loaded:
    """A model folder as one answers with it."""

    model: FullModel
    where: str

    @property
    def encoder(self) -> Encoder:
        """Raises CompositionError: there is none that several tasks share."""
        raise CompositionError(self.where, "a model folder", "a file of several tasks", "call predict")

    @property
    def shared(self) -> Encoder:
        """As :attr:`encoder`."""
        return self.encoder

    def own_parts(self) -> Sequence[Any]:
        """None."""
        return ()

    def ready(self, task: Task) -> Ready:
        """The classifier in the folder, whose outputs are in the task's units."""
        model, tokenizer = load_folder(self.model)
        tokens = partial(folder_tokens, self.model, model, tokenizer)
        return Ready(model, tokens, self.model.max_length, partial(in_units, model, task=task))


def write_folder(path: Path, model: Classifier, encoder: Encoder, task: Task, record: Mapping[str, Any]) -> None:
    """Write ``model`` whole, its weights in float32.

    A regression's range goes into the last layer, so that the folder's output is the value itself, and the model's too.
    """
    head = {name: weight.detach() for name, weight in model.head().items()}
    with folder_in_parts(path, head, encoder, task, record) as put:
        for name, weight in model.encoder.named_parameters():
            put(name, weight.detach())
    scale_head(model, task)


@contextlib.contextmanager
def folder_in_parts(
    path: Path, head: Mapping[str, Tensor], encoder: Encoder, task: Task, record: Mapping[str, Any]
) -> Iterator[Callable[[str, Tensor], None]]:
    """The same, for a model that is never there as a whole: yields ``put(name, weight)`` for the encoder's parameters.

    They come in any order, in float32. Raises OutputError for a value that is not finite.
    """
    model, kind = bare_head(encoder.config, task, head, nn.Identity()), head_of(head)
    scale_head(model, task)
    values = {name: weight.detach() for name, weight in model.head().items()} if kind.is_native else {}
    prefix = kind.prefix(model)
    shapes = {f"{prefix}{name}": tuple(weight.shape) for name, weight in encoder.model.named_parameters()}
    shapes |= {name: tuple(weight.shape) for name, weight in values.items()}
    with atomic_folder(path) as part, tensors_in_any_order(part / "model.safetensors", shapes) as put:
        for name, weight in values.items():
            put(name, weight)
        yield lambda name, weight: put(f"{prefix}{name}", weight)
        with quiet_transformers():
            kind.write_config(part, model, encoder.model, task)
            _write_beside(part, encoder, task, record)


def _write_beside(part: Path, encoder: Encoder, task: Task, record: Mapping[str, Any]) -> None:
    """The tokenizer and the record."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = record["max_length"]  # where mbert cuts, transformers must cut too
    tokenizer.save_pretrained(part)
    write_json(part / RECORD, {"format": _FORMAT, "task": task.to_json(), **record})


def scale_head(model: Classifier, task: Task) -> None:
    """Make the head give values in the task's own units, in place, where one linear layer gives its outputs."""
    (factor, offset), layer = kind_of(task).stretch(task), _output_layer(model)
    if (factor, offset) != (1.0, 0.0) and layer is not None:
        with torch.no_grad():
            layer.weight.mul_(factor)
            layer.bias.mul_(factor).add_(offset)


def unscale_head(model: Classifier, task: Task) -> None:
    """The inverse of :func:`scale_head`, in place."""
    (factor, offset), layer = kind_of(task).stretch(task), _output_layer(model)
    if (factor, offset) != (1.0, 0.0) and layer is not None:
        with torch.no_grad():
            layer.weight.div_(factor)
            layer.bias.sub_(offset).div_(factor)


def in_units(model: Classifier, outputs: Float[np.ndarray, "rows out"], task: Task) -> Float[np.ndarray, "rows out"]:
    """Outputs of the ``model`` in a folder in the task's own units, if :func:`scale_head` could not see to it."""
    return scaled(outputs, task) if _output_layer(model) is None else outputs


def _output_layer(model: Classifier) -> nn.Linear | None:
    return head_of(model.head()).output_layer(model)


def read_folder(path: Path) -> FullModel:
    """The folder's record; raises ModelFileError."""
    where = str(path / RECORD)
    remedy = "give a folder written by `mbert finetune` or `mbert merge --dense`"
    if not (path / RECORD).is_file():
        raise ModelFileError(where, "no such file", "a model folder of mbert's", remedy)
    try:
        value = read_mapping(path / RECORD)
        if value.get("format") != _FORMAT:
            raise DocumentError(f"format version {value.get('format')!r}")
        record = validate(_Record, value)
    except OSError as error:
        raise ModelFileError(where, "no such file", "a model folder of mbert's", remedy) from error
    except (DocumentError, SchemaError, MbertError) as error:
        raise ModelFileError(where, f"broken ({error})", "a record as mbert writes it", remedy) from error
    return FullModel(path, record.task, record.max_length, record.base, value)


def load_folder(folder: FullModel) -> tuple[Classifier, Any]:
    """The model and its tokenizer; outputs are logits, or values in the task's range. Raises ModelFileError."""
    where = str(folder.path)
    with told_as(ModelFileError):
        found = open_pretrained(folder.path, where)
        shell, missing = found.load()
        tokenizer = found.tokenizer()
    head = read_plain_tensors(folder.path / HEAD) if (folder.path / HEAD).exists() else None
    if head is not None:
        missing = {name for name in missing if name.startswith(f"{shell.base_model_prefix}.")}
    if missing:
        lacking = ", ".join(sorted(missing)[:3])
        raise ModelFileError(where, f"weights are missing ({lacking})", "a whole model", "write it again")
    positions = longest(shell.base_model, shell.config, tokenizer)
    if folder.max_length > positions:
        asked = f"texts of {folder.max_length} tokens"
        raise ModelFileError(str(folder.path / RECORD), asked, f"at most {positions}, the model's", "write it again")
    with told_as(ModelFileError), one_line(where):
        shell.eval().requires_grad_(False).to(default_device())
        try_out(shell.base_model, tokenizer)
    packing.enable(shell.base_model)
    return _under_head(folder, shell, head), tokenizer


def _under_head(folder: FullModel, shell: Any, head: Mapping[str, Tensor] | None) -> Classifier:
    """The model with the head that lies beside its weights; None: with the one among them."""
    if head is None:
        return NativeClassifier(shell)
    shapes = head_shapes(shell.config, folder.task, head_of(head))
    if {name: tuple(value.shape) for name, value in head.items()} != shapes:
        raise ModelFileError(str(folder.path / HEAD), "other tensors", f"{', '.join(shapes)}", "write it again")
    return bare_head(shell.config, folder.task, head, shell.base_model)


def folder_tokens(folder: FullModel, model: Classifier, tokenizer: Any, rows: Rows) -> Tokens:
    """Rows of its task as the model's head reads them, without their labels."""
    unlabelled, apart = dataclasses.replace(rows, labels=None), head_of(model.head()).apart
    return tokenise(unlabelled, folder.task, tokenizer, folder.max_length, int(tokenizer.pad_token_id or 0), apart)
