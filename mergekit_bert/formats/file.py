"""Model files of adapters, merged models and ensembles: written deterministically, read strictly, verified on saving.

A merged file has the tensors ``site.<site>.B`` and ``.A`` (or ``.dense``) and ``shift.<parameter>``. The task-specific
parameters, which are added to the shared ones, have the same names under ``own.<task>.``, and also ``head.<tensor>``
and ``extra.<name>.<tensor>``. If tasks keep a residual in addition to a shared Delta or shift, the record has the key
``private`` with the residuals' rank and bytes; if adapters without a head were merged, ``bodies`` with their
provenance. An ensemble has the tensors of each adapter under ``expert.<task>.``, and so has a merged file that keeps
its inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_bert.adapters.adapter import FORMAT, Adapter, sizes_of
from mergekit_bert.adapters.delta import Delta, delta_of, tensor_shapes
from mergekit_bert.adapters.family import FAMILIES, Tensors
from mergekit_bert.adapters.file import (
    check_dense,
    check_format,
    check_tensors,
    extra_shapes,
    strict,
    unpack,
    unpack_extras,
)
from mergekit_bert.adapters.patch import TaskSpecific
from mergekit_bert.encoder.folder import RECORD, read_folder
from mergekit_bert.errors import ModelFileError
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.peft import is_peft
from mergekit_bert.formats.record import EnsembleRecord, FolderRecord, MergedRecord, PatchRecord
from mergekit_bert.models.composition import Composition, Ensemble, Merged, Stored
from mergekit_bert.schema import validate
from mergekit_bert.tensorfile import read_tensors, tensor_file_sha256, write_tensors

_PRIVATE, _BODIES = "private", "bodies"
"""Optional keys of a merged model's record: for tasks that keep residuals, and for inputs without a task."""


def write_model(path: Path, model: Composition) -> None:
    """Write ``model`` and read it back; raises ModelFileError if that fails or gives another model."""
    write_tensors(path, *_contents(model))
    if tensor_file_sha256(*_contents(read_file(path))) != file_fingerprint(path):
        raise ModelFileError(str(path), "what was read back differs", "the same model", "check the disk")


def _contents(model: Composition) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of its file."""
    tensors, record = KINDS[model.kind].pack(model)
    return tensors, {"format": FORMAT, "kind": model.kind, model.kind: record}


def read_model(path: Path) -> Stored:
    """Read an adapter, merged or ensemble file, or a model folder; raises ModelFileError."""
    if is_peft(path):
        raise ModelFileError(
            str(path), "a PEFT folder", "a file of mbert", f"convert it: mbert convert {path} --to mbert --out FILE"
        )
    if path.is_dir():
        folder = read_folder(path)
        with strict(str(path / RECORD)):
            known = {key: value for key, value in folder.record.items() if key in FolderRecord.model_fields}
            validate(FolderRecord, known)
        return folder
    return read_file(path)


def read_file(path: Path) -> Composition:
    """Read an adapter, merged or ensemble file; raises ModelFileError."""
    tensors, metadata = read_tensors(path, old=True)
    kind = check_format(str(path), metadata)
    if kind not in KINDS or set(metadata) != {"format", "kind", kind}:
        raise ModelFileError(
            str(path),
            f"a file of kind {kind!r} with keys {', '.join(sorted(metadata))}",
            f"one of {', '.join(KINDS)}",
            "give a model file of mbert",
        )
    with strict(str(path)):
        return KINDS[kind].unpack(str(path), tensors, metadata[kind])


def _pack_deltas(prefix: str, deltas: Mapping[str, Delta], shifts: Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Deltas and shifts as tensors whose names begin with ``prefix``, and their entries in the record."""
    tensors: dict[str, Tensor] = {
        f"{prefix}site.{site}.{name}": tensor
        for site, delta in deltas.items()
        for name, tensor in delta.tensors().items()
    }
    tensors |= {f"{prefix}shift.{name}": tensor for name, tensor in shifts.items()}
    sites = {site: {"size": list(delta.shape), "rank": delta.rank} for site, delta in deltas.items()}
    return tensors, {"sites": sites, "shifts": {name: list(tensor.shape) for name, tensor in shifts.items()}}


def _shapes(prefix: str, record: PatchRecord) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a record describes."""
    expected = {
        f"{prefix}site.{site}.{name}": shape
        for site, entry in record.sites.items()
        for name, shape in tensor_shapes(entry.size, entry.rank).items()
    }
    return expected | {f"{prefix}shift.{name}": tuple(shape) for name, shape in record.shifts.items()}


def _unpack_deltas(
    prefix: str, tensors: Mapping[str, Tensor], record: PatchRecord
) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """The inverse of :func:`_pack_deltas`."""
    deltas = {
        site: delta_of({name: tensors[f"{prefix}site.{site}.{name}"] for name in tensor_shapes(entry.size, entry.rank)})
        for site, entry in record.sites.items()
    }
    return deltas, {name: tensors[f"{prefix}shift.{name}"] for name in record.shifts}


def _pack_merged(model: Merged) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, record = _pack_deltas("", model.deltas, model.shifts)
    specific: dict[str, Any] = {}
    for task, part in model.own.items():
        more, specific[task] = _pack_deltas(f"own.{task}.", part.deltas, part.shifts)
        tensors |= more | {f"own.{task}.head.{name}": tensor for name, tensor in part.head.items()}
        if part.extras:
            specific[task]["extras"] = sizes_of(part.extras)
            tensors |= {
                f"own.{task}.extra.{name}.{key}": tensor
                for name, values in part.extras.items()
                for key, tensor in values.items()
            }
    kept, experts = _pack_experts(model.kept)
    tensors |= kept
    record |= {
        "recipe": dict(model.recipe),
        "trace": dict(model.trace),
        "experts": experts,
        "kept": list(experts),
        "method": model.method,
        "weights": dict(model.weights),
        "base": dataclasses.asdict(model.base),
        "order": list(model.parts),
        "own": specific,
        "parts": {task: dict(part) for task, part in model.parts.items()},
    }
    if model.private:
        record[_PRIVATE] = model.private
    if model.bodies:
        record[_BODIES] = {name: dict(body) for name, body in model.bodies.items()}
    return tensors, record


def _unpack_merged(where: str, tensors: Mapping[str, Tensor], value: Any) -> Merged:
    record = validate(MergedRecord, value)
    bodies = value.get(_BODIES, {})
    weighed = {task: name for name in record.weights for task in name.split("+")}
    if not record.order or not (
        sorted(record.order) == sorted(record.parts) == sorted(record.own) == sorted(weighed.keys() - bodies.keys())
        and not bodies.keys() & record.parts.keys()
        and sorted(record.kept) == sorted(record.experts)
    ):
        raise ValueError(f"parts {', '.join(record.parts)} with weights {', '.join(record.weights)}")
    kept, tensors = _unpack_experts(where, tensors, {task: value["experts"][task] for task in record.kept})
    expected = _shapes("", record)
    for task, part in record.parts.items():
        if part.task.name != task:
            raise ValueError(f"the part {task!r} is of another task")
        expected |= _shapes(f"own.{task}.", record.own[task])
        expected |= {f"own.{task}.head.{name}": tuple(shape) for name, shape in part.head.items()}
        if sizes := record.own[task].extras:
            shapes = extra_shapes(FAMILIES.get(part.type), part.config, sizes)
            expected |= {f"own.{task}.{name}": shape for name, shape in shapes.items()}
    check_tensors(where, tensors, expected)
    check_dense(
        where, [site.size for patch in (record, *record.own.values()) for site in patch.sites.values()], tensors
    )
    deltas, shifts = _unpack_deltas("", tensors, record)
    model = Merged(
        method=record.method,
        weights={name: record.weights[name] for name in _in_order(weighed, [*record.order, *sorted(bodies)])},
        base=record.base,
        deltas=deltas,
        shifts=shifts,
        own={
            task: TaskSpecific(
                {name: tensors[f"own.{task}.head.{name}"] for name in record.parts[task].head},
                *_unpack_deltas(f"own.{task}.", tensors, record.own[task]),
                unpack_extras(f"own.{task}.", record.own[task].extras, tensors),
            )
            for task in record.order
        },
        parts={task: value["parts"][task] for task in record.order},
        recipe=value["recipe"],
        trace=value["trace"],
        kept=kept,
        bodies=bodies,
    )
    _check_own(model, value.get(_PRIVATE, {}))
    return model


def _in_order(weighed: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The weights' names in the order of the tasks and bodies; a body inside a merged input has no weight."""
    return list(dict.fromkeys(weighed[name] for name in names if name in weighed))


def _check_own(model: Merged, recorded: Mapping[str, int]) -> None:
    """Raise ValueError unless task-specific parameters fit the shared ones and the recorded residuals (``private``)."""
    for task, specific in model.own.items():
        for name in [
            site for site, delta in specific.deltas.items() if delta.shape != model.deltas.get(site, delta).shape
        ]:
            raise ValueError(f"site {name!r} of {task!r} has another shape than the shared one")
        for name in [
            name for name, shift in specific.shifts.items() if shift.shape != model.shifts.get(name, shift).shape
        ]:
            raise ValueError(f"shift {name!r} of {task!r} has another shape than the shared one")
    if recorded != model.private:
        raise ValueError(f"private {recorded}, but the tasks keep {model.private or 'no residuals'}")


def _pack_ensemble(model: Ensemble) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, experts = _pack_experts(model.experts)
    return tensors, {"router": model.router, "order": list(experts), "experts": experts}


def _unpack_ensemble(where: str, tensors: Mapping[str, Tensor], value: Any) -> Ensemble:
    record = validate(EnsembleRecord, value)
    if sorted(record.order) != sorted(record.experts):
        raise ValueError(f"the order {', '.join(record.order)} with experts {', '.join(record.experts)}")
    experts, others = _unpack_experts(where, tensors, {task: value["experts"][task] for task in record.order})
    for name in others:
        raise ModelFileError(where, f"an extra tensor {name!r}", "tensors of its experts", "write the file again")
    return Ensemble(experts)


def _pack_experts(experts: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Complete adapters, their tensors under ``expert.<task>.``."""
    packed = {task: expert.pack() for task, expert in experts.items()}
    tensors = {f"expert.{task}.{name}": tensor for task, (part, _) in packed.items() for name, tensor in part.items()}
    return tensors, {task: record for task, (_, record) in packed.items()}


def _unpack_experts(
    where: str, tensors: Mapping[str, Tensor], records: Mapping[str, Any]
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """The adapters, and the remaining tensors."""
    rest, experts = dict(tensors), dict[str, Adapter]()
    for task, record in records.items():
        prefix = f"expert.{task}."
        stored = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        experts[task] = unpack(where, stored, record)
        if experts[task].name != task or experts[task].base != next(iter(experts.values())).base:
            raise ValueError(f"the expert {task!r} is of another task or base")
    return experts, rest


@dataclass(frozen=True)
class _Kind:
    """How a kind of model is stored: ``pack`` returns its tensors and its record, ``unpack`` is the inverse."""

    pack: Callable[[Any], tuple[dict[str, Tensor], dict[str, Any]]]
    unpack: Callable[[str, Mapping[str, Tensor], Any], Composition]


KINDS: Mapping[str, _Kind] = {
    Adapter.kind: _Kind(Adapter.pack, unpack),
    Merged.kind: _Kind(_pack_merged, _unpack_merged),
    Ensemble.kind: _Kind(_pack_ensemble, _unpack_ensemble),
}
