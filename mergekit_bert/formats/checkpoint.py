"""Fine-tuned checkpoints as merge inputs: their difference to the base, read from the folder on demand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_bert.adapters.base import encoder_of
from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.patch import TaskSpecific
from mergekit_bert.composing.lazy import LazyMap
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import TASKS, Task
from mergekit_bert.encoder.classifier import bare_head, head_shapes
from mergekit_bert.encoder.folder import RECORD, FullModel, read_folder, unscale_head
from mergekit_bert.encoder.head import head_of
from mergekit_bert.encoder.load import Base, Encoder, tokenizer_fingerprint
from mergekit_bert.encoder.pooled import HEAD
from mergekit_bert.encoder.pretrained import Pretrained, open_pretrained, told_as
from mergekit_bert.encoder.sites import linear_layers, of_the_head
from mergekit_bert.encoder.stored import StoredWeights, is_buffer, open_encoder, stored_weights
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import file_fingerprint
from mergekit_bert.tensorfile import read_plain_tensors

_NO_MATTER = re.compile(r"_.*|.*(dropout|label|dtype|version|initializer).*|architectures|problem_type|use_cache")
"""Configuration keys that do not change what the encoder computes."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json", "*.model")


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model of one task and its base ``encoder``; Deltas and shifts are read on demand.

    ``deltas`` are those of all linear layers, ``shifts`` those of all other parameters except the head.
    """

    path: Path
    task: Task
    max_length: int
    encoder: Encoder
    deltas: Mapping[str, Delta]
    shifts: Tensors
    head: Tensors


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the folder of a whole transformers model."""
    return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()


def read_checkpoint(path: Path, base: str | Encoder | None = None) -> MergeInput:
    """A folder with ``config.json`` and the weights of a classifier in safetensors, as a merge input.

    ``base`` is the encoder it was fine-tuned from; a folder of mbert records it. The task is the one in mbert's record,
    otherwise the built-in task with the folder's name. Raises CompositionError for a folder with another architecture,
    shape, vocabulary or number of labels than the base, before any weight is read.
    """
    where = str(path)
    record = read_folder(path) if (path / RECORD).is_file() else None
    if base is None and record is None:
        raise CompositionError(where, "a checkpoint that does not record its base", "its base", "name it with `base`")
    encoder = encoder_of(where, record.base if record is not None else "", base, open_encoder)
    with told_as(CompositionError):
        found = open_pretrained(path, where)
    weights = stored_weights(found.tensors, encoder.model)
    _check_config(where, found.config, encoder)
    _check_names(where, weights, encoder)
    task = record.task if record is not None else _task_of(where, path)
    length = record.max_length if record is not None else encoder.max_length
    if record is None:
        _check_tokenizer(found, encoder)
    _check_labels(where, found.config, task)
    head = _head(path, weights, task, encoder)
    return _merge_input(Checkpoint(path, task, length, encoder, *_changes(weights, encoder), head), record)


def _changes(weights: StoredWeights, encoder: Encoder) -> tuple[Mapping[str, Delta], Tensors]:
    """Deltas of the linear layers and shifts of all other parameters."""
    before, sites = encoder.weights, linear_layers(encoder)

    def shift(name: str) -> Tensor:
        return weights[name].sub_(before[name].cpu())

    def delta(site: str) -> Delta:
        return Dense(shift(f"{site}.weight"))

    others = [name for name in weights if name.removesuffix(".weight") not in sites or not name.endswith(".weight")]
    return LazyMap(sites, delta), LazyMap(others, shift)


def _merge_input(checkpoint: Checkpoint, record: FullModel | None) -> MergeInput:
    training: Mapping[str, Any] = dict(record.record.get("training", {})) if record is not None else {}
    examples = training.get("examples")
    specific = TaskSpecific(checkpoint.head, _apart(checkpoint.deltas, head=True), _apart(checkpoint.shifts, head=True))
    part = {
        "type": "full",
        "config": {},
        "task": checkpoint.task.to_json(),
        "max_length": checkpoint.max_length,
        "head": {name: list(tensor.shape) for name, tensor in checkpoint.head.items()},
        "basis": None,
        "training": training,
        "scores": dict(record.record.get("scores", {})) if record is not None else {},
        "sha256": "",  # hashing all of it takes longer than merging it: see MergeInput.identify
    }
    return MergeInput(
        name=checkpoint.task.name,
        base=Base.of(checkpoint.encoder),
        deltas=_apart(checkpoint.deltas, head=False),
        shifts=_apart(checkpoint.shifts, head=False),
        own={checkpoint.task.name: specific},
        parts={checkpoint.task.name: part},
        identify=lambda: {checkpoint.task.name: file_fingerprint(checkpoint.path)},
        encoder=checkpoint.encoder,
        examples=examples if isinstance(examples, int) and examples > 0 else None,
    )


def _apart(values: Mapping[str, Any], head: bool) -> LazyMap[Any]:
    """The values that only a task's head reads (its pooler), or the others."""
    return LazyMap([name for name in values if of_the_head(name) == head], values.__getitem__)


def _check_config(where: str, config: Any, encoder: Encoder) -> None:
    """Raise CompositionError if the folder's encoder has another configuration than the base."""
    ours, theirs = encoder.config.to_dict(), config.to_dict()
    for key in ("model_type", *sorted(ours.keys() & theirs.keys())):
        if not _NO_MATTER.fullmatch(key) and ours[key] != theirs[key]:
            raise CompositionError(
                where,
                f"{key} is {theirs[key]!r}",
                f"{ours[key]!r}, as in base {encoder.name!r}",
                "give checkpoints of one base",
            )


def _check_names(where: str, weights: StoredWeights, encoder: Encoder) -> None:
    """Raise CompositionError unless the folder has the base's parameters in the base's shapes."""
    for name, parameter in encoder.model.named_parameters():
        found, shape = weights.shapes.get(name), tuple(parameter.shape)
        if found != shape:
            raise CompositionError(
                where,
                f"{name} has shape {found}" if found is not None else f"no tensor {name}",
                f"{shape}, as in base {encoder.name!r}",
                "give the `base` that it was made from",
            )


def _check_tokenizer(found: Pretrained, encoder: Encoder) -> None:
    """Raise CompositionError if the folder has another tokenizer than the base."""
    if not any(any(found.folder.glob(name)) for name in _TOKENIZER_FILES):
        return
    with told_as(CompositionError):
        tokenizer = found.tokenizer()
    if tokenizer_fingerprint(tokenizer) != encoder.tokenizer_fingerprint:
        same = tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
        raise CompositionError(
            found.where,
            "other rules of the tokenizer" if same else "another vocabulary",
            f"the tokenizer of base {encoder.name!r}",
            "give the `base` that it was made from",
        )


def _task_of(where: str, path: Path) -> Task:
    name = path.resolve().name
    if name not in TASKS.names():
        raise CompositionError(
            where,
            "a checkpoint that does not record its task",
            f"a folder named after one of {', '.join(TASKS.names())}",
            "rename the folder",
        )
    return TASKS.get(name)


def _head(path: Path, weights: StoredWeights, task: Task, encoder: Encoder) -> dict[str, Tensor]:
    """The head's tensors, from the weights or a file of their own; regression heads are rescaled to 0…1."""
    where, beside = str(path), read_plain_tensors(path / HEAD) if (path / HEAD).exists() else {}
    expected = head_shapes(encoder.config, task, head_of(beside))
    found = {name: weights.tensors.shapes[name] for name in weights.rest if not is_buffer(name)}
    found |= {name: tuple(tensor.shape) for name, tensor in beside.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CompositionError(
                where,
                f"{name} has shape {found[name]}" if name in found else f"no tensor {name}",
                f"{expected[name]} for task {task.name!r}" if name in expected else f"heads of {', '.join(expected)}",
                "give a sequence classification checkpoint of this task",
            )
    values = {name: beside[name] if name in beside else weights.tensors[name].float() for name in expected}
    model = bare_head(encoder.config, task, values, nn.Identity())
    unscale_head(model, task)
    return {name: tensor.detach().cpu() for name, tensor in model.head().items()}


def _in_order(id2label: Mapping[int, str]) -> list[str]:
    return [str(id2label[place]) for place in sorted(id2label)]


def _check_labels(where: str, config: Any, task: Task) -> None:
    """Raise CompositionError if the checkpoint's labels differ from the task's in number or order."""
    labels, kind = _in_order(config.id2label), kind_of(task)
    if len(labels) != task.outputs:
        raise CompositionError(
            where,
            f"{len(labels)} labels",
            f"{task.outputs} for task {task.name!r}",
            "give a checkpoint of that task, or rename its folder to its task",
        )
    for known in (kind.output_names(task), _in_order(kind.to_hub(task).id2label)):
        if sorted(labels) == sorted(known) and labels != list(known):
            raise CompositionError(
                where, f"labels in the order {', '.join(labels)}", ", ".join(known), "fine-tune with the task's order"
            )
