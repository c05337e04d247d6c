"""PEFT folders in and out: which base and task one is for, and what it becomes here."""

from collections.abc import Mapping
from pathlib import Path

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.base import Loader, encoder_of
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.patch import TaskSpecific
from mergekit_bert.composing.merge_input import MergeInput, inputs_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.forward import check_same_outputs
from mergekit_bert.encoder.load import Base, Encoder, load_encoder
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.peft import WEIGHTS, PeftFolder, open_peft
from mergekit_bert.formats.peft_reading import adapter_of
from mergekit_bert.formats.peft_task import folder_name, stand_in, task_of
from mergekit_bert.formats.peft_writing import FILES, write_adapter_folder
from mergekit_bert.models.composition import Composition, Merged
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.outputs import Output, written

_CHECK = ("A short text.", "Another one, a little longer than the first, to be sure of the padding.")


def read_peft(
    path: Path, base: str | Encoder | None = None, task: Task | None = None, load: Loader = load_encoder
) -> Adapter | Merged:
    """The PEFT folder ``path`` as an adapter; where it has linear layers saved whole, as a merged model of one task.

    ``base`` and ``task`` are what the folder itself does not say; by default the task is that of
    :func:`~mergekit_bert.formats.peft_task.task_of`. Raises ModelFileError or CompositionError.
    """
    folder, encoder = _opened(path, base, load)
    return _model(folder, encoder, task or folder.task or task_of(folder, encoder) or stand_in(folder_name(path)))


def read_peft_input(path: Path, base: str | Encoder | None = None, load: Loader = load_encoder) -> MergeInput:
    """The same as an input of a merge, which need not have a head: then it is a body, named like the folder.

    What only a head would read of it (BERT's pooler) is left out.
    """
    folder, encoder = _opened(path, base, load)
    task = folder.task or task_of(folder, encoder)
    return inputs_of(_model(folder, encoder, task))[0] if task is not None else _body(folder, encoder)


def _opened(path: Path, base: str | Encoder | None, load: Loader) -> tuple[PeftFolder, Encoder]:
    folder = open_peft(path)
    named = folder.base or "" if base is not None else _base(folder)
    return folder, encoder_of(str(path), named, base, load)


def _model(folder: PeftFolder, encoder: Encoder, task: Task) -> Adapter | Merged:
    adapter, dense = adapter_of(folder, encoder, task)
    return _merged(folder.path, adapter, dense) if dense else adapter


def _body(folder: PeftFolder, encoder: Encoder) -> MergeInput:
    adapter, dense = adapter_of(folder, encoder, stand_in(folder_name(folder.path)), body=True)
    deltas = {**adapter.deltas(), **dense}
    record = {key: value for key, value in adapter.provenance().items() if key in ("type", "config", "training")}
    sha256 = file_fingerprint(folder.path / WEIGHTS)
    return MergeInput(
        name=adapter.name,
        base=adapter.base,
        deltas={site: delta for site, delta in deltas.items() if not of_the_head(site)},
        shifts={name: shift for name, shift in adapter.shifts.items() if not of_the_head(name)},
        own={},
        parts={},
        identify=lambda: {adapter.name: sha256},
        bodies={adapter.name: record | {"sha256": sha256}},
    )


def _base(folder: PeftFolder) -> Base | str:
    """What the folder says of its base; raises CompositionError where that cannot be followed."""
    if folder.base is not None:
        return folder.base
    name, revision = folder.base_name, folder.config.revision
    if not name or revision not in (None, "", "main"):
        raise CompositionError(
            str(folder.path),
            f"base {name!r:.200}, revision {revision!r:.60}",
            "the name of a base",
            "name its base with `base`",
        )
    return name


def _merged(path: Path, adapter: Adapter, dense: Mapping[str, Delta]) -> Merged:
    name, deltas = adapter.name, {**adapter.deltas(), **dense}
    own = TaskSpecific(
        adapter.head,
        {site: delta for site, delta in deltas.items() if of_the_head(site)},
        {one: shift for one, shift in adapter.shifts.items() if of_the_head(one)},
    )
    return Merged(
        method="peft",
        weights={name: 1.0},
        base=adapter.base,
        deltas={site: delta for site, delta in deltas.items() if not of_the_head(site)},
        shifts={one: shift for one, shift in adapter.shifts.items() if not of_the_head(one)},
        own={name: own},
        parts={name: adapter.provenance() | {"sha256": file_fingerprint(path / WEIGHTS)}},
    )


def write_peft(folder: Path, model: Composition, encoder: Encoder, force: bool = False) -> list[Path]:
    """Write an adapter as the PEFT folder ``folder``, other models as ``folder/<task>/`` for each of their tasks.

    Every folder is read back and must give the same outputs. Raises OutputError, CompositionError, ModelFileError.
    """
    paths = {path: model.as_adapter(task) for task, path in model.places(folder).items()}
    with written(*(Output(path, force, FILES) for path in paths)) as parts:
        expected = Predictor(model, encoder)
        for part, adapter in zip(parts, paths.values(), strict=True):
            write_adapter_folder(part, adapter, encoder)
            rows = Rows(tuple((text,) * len(adapter.task.text) for text in _CHECK), None, "check")
            found = Predictor(read_peft(part, encoder), encoder)
            check_same_outputs(str(part), expected.outputs(adapter.name, rows), found.outputs(adapter.name, rows))
    return list(paths)
