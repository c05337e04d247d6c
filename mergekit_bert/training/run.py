"""Training runs: from rows to a finished adapter file or model folder, resumable at any moment."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, fold
from mergekit_bert.adapters.avoiding import FrozenRows, avoiding, by_identity, check_avoided
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import USUAL, Options
from mergekit_bert.adapters.extra import NONE, Virtual
from mergekit_bert.adapters.family import FAMILIES, Family, Size
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.adapters.patch import Patch, room_for_text, tokens_of
from mergekit_bert.adapters.statistics import Statistic, check_kinds
from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.folder import FILES, FullModel, in_units, load_folder, read_folder, write_folder
from mergekit_bert.encoder.forward import check_same_outputs, forward_rows, padded_outputs, scaled
from mergekit_bert.encoder.head import HEADS, Head
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.errors import MbertWarning, TrainingError
from mergekit_bert.hardware import (
    default_device,
    generator,
    gpu_meter,
    pick_precision,
    threads,
)
from mergekit_bert.training.config import ADAPTER_RATES, FULL_RATES, TrainConfig
from mergekit_bert.training.loop import Outcome
from mergekit_bert.training.manifest import (
    Control,
    begin,
    check_recorded,
    claim,
    delivered,
    finish,
    provenance,
    recorded,
    run_folder,
)
from mergekit_bert.training.supervised import TrainingRun, fit
from mergekit_bert.training.trainable import adapter_trainable, full_trainable, sites_of, virtual_of

_CHECKED_ROWS = 8
_NEW = ("balance", "head")
"""Options that older runs did not have: recorded only if they differ from the default."""
_MEASURED_ROWS = 512
"""Most training rows that statistics are measured on."""


def train_adapter(
    encoder: Encoder,
    task: Task,
    rows: Rows,
    out: Path,
    kind: str = USUAL,
    adapter: Options | None = None,
    train: TrainConfig | None = None,
    control: Control | None = None,
    with_stats: Sequence[str] = (),
    avoid: Sequence[Adapter] = (),
) -> Adapter:
    """Train an adapter of family ``kind`` on ``rows`` and write it to ``out``, with the statistics ``with_stats``.

    ``avoid`` are other tasks' adapters, for ``basis=avoid``. Raises TrainingError, BasisError, OutputError, DataError,
    ModelFileError or UnknownNameError before any long work.
    """
    check_kinds(with_stats)
    family, train, control = FAMILIES.get(kind), train or TrainConfig(), control or Control()
    options: Options = family.configured({}, adapter)
    rates = (family.lr or ADAPTER_RATES[0], family.head_lr or ADAPTER_RATES[1])
    sites = sites_of(encoder, family, options, HEADS.get(train.head))
    shifted = family.shifted(options, encoder.model)
    if not family.head_alone and not (sites or shifted or family.extras):
        raise TrainingError(
            f"base {encoder.name!r}",
            f"no layer that `type={family.name}` can adapt",
            family.description,
            "choose another `type` or base",
        )
    others = {name: one.on(encoder) for name, one in by_identity(avoid).items()}
    check_avoided(others.values(), task.name, encoder, options, sites)
    avoided = {"avoid": list(others)} if others else {}
    virtual = virtual_of(encoder, family, options)
    described = {"type": family.name, "adapter": options.to_json()}
    described |= ({"statistics": sorted(set(with_stats))} if with_stats else {}) | avoided
    with claim(out, control) as hold:
        setting = _setting(encoder, task, rows, train, control, run_folder(out), described, rates, virtual)
        if hold.resume:  # before basis rows are taken from the ledger
            check_recorded(setting.folder, setting.run, hold.finished)
        if hold.finished:
            return read_adapter(out).on(encoder)
        basis = _basis_rows(encoder, out, options, sites)
        frozen = avoiding(list(others.values()), options, sites) if others else basis
        setting = dataclasses.replace(setting, run=setting.run | {"basis": basis.to_json() if basis else None})
        begin(setting, hold)
        work = adapter_trainable(encoder, task, family.name, options, sites, frozen, train)
        with gpu_meter(default_device()) as meter:
            outcome = fit(work, setting)
        trained = _adapter(encoder, setting, outcome, family.name, options, sites, basis, frozen, avoided)
        trained = dataclasses.replace(trained, statistics=_measured(trained, encoder, rows, train, with_stats))
        with delivered(setting, hold, outcome) as part:
            write_adapter(part, trained)
            _check_reload(part, trained, encoder, setting)
        finish(out, setting, outcome, work, meter)
        return trained


def _adapter(
    encoder: Encoder,
    setting: TrainingRun,
    outcome: Outcome,
    kind: str,
    config: Options,
    sites: Mapping[str, Size],
    basis: BasisRows | None,
    frozen: FrozenRows | None,
    avoided: dict[str, Any],
) -> Adapter:
    """The trained adapter."""
    values = _split(outcome.best)
    return Adapter(
        type=kind,
        config=config,
        task=setting.task,
        base=Base.of(encoder),
        max_length=_max_length(encoder, setting.config),
        sites=sites,
        tensors=_site_tensors(values["site"], FAMILIES.get(kind), sites, frozen),
        shifts={name: value - encoder.model.get_parameter(name).cpu() for name, value in values["shift"].items()},
        head=values["head"],
        basis=basis,
        training=provenance(setting, outcome) | avoided,
        scores={f"held_out_{setting.task.metric}": _best_score(outcome)},
        extras=_kept(FAMILIES.get(kind), encoder, values["extra"]),
    ).on(encoder)


def finetune(
    encoder: Encoder,
    task: Task,
    rows: Rows,
    out: Path,
    train: TrainConfig | None = None,
    control: Control | None = None,
) -> FullModel:
    """Train every weight on ``rows`` and write a plain Hugging Face folder to ``out``: the reference for adapters."""
    train, control = train or TrainConfig(), control or Control()
    with claim(out, control, FILES) as hold:
        setting = _setting(encoder, task, rows, train, control, run_folder(out), {"type": "full"}, FULL_RATES)
        if hold.resume:
            check_recorded(setting.folder, setting.run, hold.finished)
        if hold.finished:
            return read_folder(out)
        begin(setting, hold)
        work = full_trainable(encoder, task, train)
        with gpu_meter(default_device()) as meter:
            outcome = fit(work, setting)
        with torch.no_grad():
            for name, parameter in work.parameters.items():
                parameter.copy_(outcome.best[name])
        record = {
            "kind": "full",
            "base": dataclasses.asdict(Base.of(encoder)),
            "max_length": _max_length(encoder, train),
            "training": provenance(setting, outcome),
            "scores": {f"held_out_{task.metric}": _best_score(outcome)},
        }
        with delivered(setting, hold, outcome) as part:
            sample = _sample(setting.held_out)
            expected = scaled(forward_rows(work.model, sample), task)  # before the model itself is scaled
            write_folder(part, work.model, encoder, task, record)
            written = load_folder(read_folder(part))[0]
            check_same_outputs(str(part), expected, in_units(written, padded_outputs(written, sample), task))
        finish(out, setting, outcome, work, meter)
        return read_folder(out)


def _measured(
    adapter: Adapter, encoder: Encoder, rows: Rows, train: TrainConfig, kinds: Sequence[str]
) -> dict[str, Mapping[str, Statistic]]:
    """The requested statistics, measured on a sample of the rows."""
    order = torch.randperm(len(rows), generator=generator(train.seed, 17)).tolist()
    sample = rows.take(sorted(order[:_MEASURED_ROWS]))
    return {kind: collect(kind, encoder, [adapter.part(adapter.name)], [sample]) for kind in sorted(set(kinds))}


def _basis_rows(encoder: Encoder, out: Path, adapter: Options, sites: Mapping[str, Size]) -> BasisRows | None:
    if adapter.basis != "orthogonal" or not sites:
        return None
    width = min(in_features for _, in_features in sites.values())
    return Ledger(out.parent).take(encoder.fingerprint, out.stem, adapter.rank, width)


def _setting(
    encoder: Encoder,
    task: Task,
    rows: Rows,
    train: TrainConfig,
    control: Control,
    folder: Path,
    described: dict[str, Any],
    rates: tuple[float, float],
    virtual: Virtual = NONE,
) -> TrainingRun:
    """Hold rows out, tokenise, and describe the run, so that checkpoints of other runs are recognised.

    ``virtual`` are the tokens that extras add to a sequence; raises TrainingError if they leave no room for text.
    """
    if train.threads is not None and train.threads != threads():
        raise TrainingError(
            "threads", f"torch uses {threads()}", f"{train.threads}", "call mergekit_bert.hardware.set_threads first"
        )
    head = HEADS.get(train.head)
    head.check(task)
    length = _max_length(encoder, train)
    _check_room(encoder, task, head, length, virtual)
    kept, held = hold_out(rows, train.hold_out, train.hold_out_limit, train.seed)
    tokens, held_tokens = (tokens_of(encoder, task, part, head, length, virtual) for part in (kept, held))
    _tell_truncated(task, tokens, held_tokens, length)
    run = described | {
        "task": task.to_json(),
        "base": encoder.fingerprint,
        "tokenizer": encoder.tokenizer_fingerprint,
        "data": rows.fingerprint(),
        "train": {
            key: value
            for key, value in dataclasses.asdict(train).items()
            if key not in ("checkpoint_seconds", "precision", "threads")
            and (key not in _NEW or value != getattr(TrainConfig, key))
        },
        "threads": threads(),
        "precision": _precision(train, folder, control.resume),
        "lr": train.lr or rates[0],
        "head_lr": train.head_lr or rates[1],
    }
    run = json.loads(json.dumps(run))
    return TrainingRun(
        task,
        tokens,
        held_tokens,
        train,
        run["lr"],
        run["head_lr"],
        getattr(torch, run["precision"]),
        folder,
        run,
        control.tensorboard,
        control.show,
    )


def _precision(train: TrainConfig, folder: Path, resume: bool) -> str:
    """The precision; ``auto`` is measured once, and a resumed run keeps its precision."""
    earlier = recorded(folder) if resume and train.precision == "auto" else None
    if earlier is not None and "precision" in earlier[1]:
        return str(earlier[1]["precision"])
    return str(pick_precision(train.precision, default_device())).removeprefix("torch.")


def _max_length(encoder: Encoder, train: TrainConfig) -> int:
    return min(train.max_length, encoder.max_length)


def _check_room(encoder: Encoder, task: Task, head: Head, length: int, virtual: Virtual) -> None:
    """Raise TrainingError if the virtual tokens leave too few tokens for text."""
    room, least = room_for_text(encoder, task, head, length, virtual)
    if virtual.total and room < least:
        raise TrainingError(
            "`length`",
            f"{virtual.total} virtual tokens of at most {length} in a sequence (`max_length`, or the base's limit)",
            f"at most {max(length - least, 0)}, so that text fits",
            "give a smaller `length`",
        )


def _tell_truncated(task: Task, tokens: Tokens, held: Tokens, length: int) -> None:
    count = tokens.truncated + held.truncated
    if count:
        warnings.warn(
            f"{task.name}: {count} of {len(tokens) + len(held)} rows are longer than {length} tokens and "
            "are truncated (`max_length`)",
            MbertWarning,
            stacklevel=4,
        )


def _split(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameters by what they belong to, on the CPU."""
    parts: dict[str, dict[str, Tensor]] = {"site": {}, "shift": {}, "extra": {}, "head": {}}
    for name, value in values.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.cpu()
    return parts


def _kept(family: Family, encoder: Encoder, values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of the trained extras."""
    trained: dict[str, dict[str, Tensor]] = {extra.name: {} for extra in family.extras}
    for name, value in values.items():
        extra_name, _, key = name.partition(".")
        trained[extra_name][key] = value
    return {extra.name: extra.kept(extra.size(encoder), trained[extra.name]) for extra in family.extras}


def _site_tensors(
    values: Mapping[str, Tensor], family: Family, sites: Mapping[str, Size], frozen: FrozenRows | None
) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {
        site: {name: frozen.matrix(site, size[1]) for name in family.frozen(frozen)} if frozen else {}
        for site, size in sites.items()
    }
    for name, value in values.items():
        site, _, tensor = name.rpartition(".")
        tensors[site][tensor] = value
    return tensors


def _check_reload(out: Path, trained: Adapter, encoder: Encoder, setting: TrainingRun) -> None:
    """Compare the outputs of the adapter as it was trained with those of the written one folded into the weights."""
    beside = classifier(fold(encoder, Patch({}, trained.shifts, trained.extras)), trained.task, trained.head)
    attach(beside, trained.type, trained.tensors, frozenset(), trained.config, generator(0))
    part = read_adapter(out).on(encoder).part(trained.name)
    folded = classifier(fold(encoder, part), part.task, part.head)
    sample = _sample(setting.held_out)
    check_same_outputs(str(out), forward_rows(beside, sample), padded_outputs(folded, sample))


def _best_score(outcome: Outcome) -> float:
    """The score of the best epoch, which every supervised run has."""
    assert outcome.progress.best_score is not None
    return outcome.progress.best_score


def _sample(tokens: Tokens) -> Tokens:
    """A few rows on which a model's outputs are compared before and after writing it."""
    return dataclasses.replace(tokens, labels=None).take(range(min(_CHECKED_ROWS, len(tokens))))
