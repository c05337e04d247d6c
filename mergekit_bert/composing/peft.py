"""PEFT folders in and out: which base and task one is for, and what it becomes here."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mergekit_bert.adapters.adapter import Adapter, Base, Part
from mergekit_bert.adapters.base import Loader, encoder_of
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.adapters.file import provenance
from mergekit_bert.adapters.peft import WEIGHTS, PeftFolder, open_peft
from mergekit_bert.adapters.peft_reading import adapter_of
from mergekit_bert.adapters.peft_writing import FILES, write_adapter_folder
from mergekit_bert.composing.composition import Composition, Ensemble, Merged, Own
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import TASKS, Task
from mergekit_bert.encoder.forward import check_same_outputs
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import file_fingerprint
from mergekit_bert.outputs import Output, written
from mergekit_bert.patterns import exactly

_CHECK = ("A short text.", "Another one, a little longer than the first, to be sure of the padding.")


def read_peft(
    path: Path, base: str | Encoder | None = None, task: Task | None = None, load: Loader = load_encoder
) -> Adapter | Merged:
    """The PEFT folder ``path`` as an adapter, or, where its Deltas are dense (DoRA), as a merged model of one task.

    ``base`` and ``task`` are what the folder itself does not say. Raises ModelFileError or CompositionError.
    """
    folder = open_peft(path)
    task = task or folder.task or _named(path)
    named = folder.base or "" if base is not None else _base(folder)
    encoder = encoder_of(str(path), named, base, load)
    adapter, dense = adapter_of(folder, encoder, task)
    return _merged(path, adapter, dense) if dense else adapter


def _named(path: Path) -> Task:
    """The built-in task that the folder is named like."""
    name = path.resolve().name
    if name not in TASKS.names():
        raise CompositionError(
            str(path),
            "a PEFT folder that does not say its task",
            f"a folder named like a built-in task ({', '.join(TASKS.names())})",
            f"name the task: mbert convert {path} --to mbert --task NAME (or a task's .yml)",
        )
    return TASKS.get(name)


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
    own = Own(
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
        parts={name: provenance(adapter) | {"sha256": file_fingerprint(path / WEIGHTS)}},
    )


def write_peft(folder: Path, model: Composition, encoder: Encoder, force: bool = False) -> list[Path]:
    """Write an adapter as the PEFT folder ``folder``, other models as ``folder/<task>/`` for each of their tasks.

    Every folder is read back and must give the same outputs. Raises OutputError, CompositionError, ModelFileError.
    """
    if isinstance(model, Adapter):
        paths = {folder: model}
    else:
        paths = {folder / task.name: _expert(model, task.name) for task in model.tasks}
    with written(*(Output(path, force, FILES) for path in paths)) as parts:
        expected = Predictor(model, encoder)
        for part, adapter in zip(parts, paths.values(), strict=True):
            write_adapter_folder(part, adapter, encoder)
            rows = Rows(tuple((text,) * len(adapter.task.text) for text in _CHECK), None, "check")
            found = Predictor(read_peft(part, encoder), encoder)
            check_same_outputs(str(part), expected.outputs(adapter.name, rows), found.outputs(adapter.name, rows))
    return list(paths)


def _expert(model: Merged | Ensemble, task: str) -> Adapter:
    if isinstance(model, Ensemble):
        return model.experts[task]
    return _as_adapter(model.part(task), model)


def _as_adapter(part: Part, model: Merged) -> Adapter:
    """A part of low-rank Deltas as a LoRA whose rank differs from site to site; CompositionError for a dense one."""
    low: dict[str, LowRank] = {}
    for site, delta in part.deltas.items():
        if not isinstance(delta, LowRank):
            raise CompositionError(
                f"site {site!r}", "a dense Delta", "low-rank ones, for PEFT", "give `rank=R` at merge, or `to=hf`"
            )
        if delta.rank > 0:
            low[site] = delta
    ranks = {site: delta.rank for site, delta in low.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    own = {site: rank for site, rank in ranks.items() if rank != usual}
    config = AdapterConfig(
        rank=usual,
        alpha=float(usual),
        targets=exactly(low),
        basis="random",
        rank_pattern=own,
        alpha_pattern={site: float(rank) for site, rank in own.items()},
    )
    return Adapter(
        type="lora",
        config=config,
        task=part.task,
        base=model.base,
        max_length=part.max_length,
        sites={site: delta.shape for site, delta in low.items()},
        tensors={site: {"A": delta.A, "B": delta.B} for site, delta in low.items()},
        shifts=part.shifts,
        head=part.head,
        basis=None,
        training={"method": model.method, "weights": dict(model.weights)},
        scores={},
    )
