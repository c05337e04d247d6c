"""What lies beside models: ledgers, recorded figures, runs and their checkpoints, searches, comparisons."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mergekit_bert as mb
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.cli.report import after_training
from mergekit_bert.composing import learning
from mergekit_bert.composing.merging import MergeContext, merge, merge_inputs_of
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.load import Base
from mergekit_bert.evaluation import method_comparison, search
from mergekit_bert.evaluation.comparison import compare
from mergekit_bert.evaluation.merge_results import run_recipe
from mergekit_bert.evaluation.method_comparison import (
    comparison_fingerprint,
    comparison_rows,
    full_finetuning_scores,
    refuse_other_results,
    with_earlier_results,
)
from mergekit_bert.evaluation.records import find_records, read_record, record_path, write_record
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_text, comparison_table, method_table
from mergekit_bert.files import write_json
from mergekit_bert.tensorfile import read_tensors, write_tensors
from mergekit_bert.training import loop
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.manifest import MANIFEST, Control, run_folder
from tests.fuzz.containers import MODEL
from tests.fuzz.format import Format, UnsoundError, Workshop, answered, finite, shown, strict_json
from tests.fuzz.models import Stages, inspected
from tests.fuzz.trees import JSON
from tests.training.runs import train

NARROWEST = 24


class Stopped(BaseException):
    """Stands for a kill."""


def use_ledger(shop: Workshop, folder: Path) -> Stages:
    """Hand out rows to a new adapter and to one that has some, and ask how many more would fit."""
    ledger, base = Ledger(folder), shop.encoder.fingerprint
    new = ledger.take(base, "new", 3, NARROWEST)
    yield "take", new
    if not 0 <= new.start <= new.start + new.count <= NARROWEST:
        raise UnsoundError(f"rows that do not exist: {new}")
    yield "take again", [ledger.take(base, "sst", 3, NARROWEST), ledger.take("other", "x", 12, NARROWEST)]
    yield "capacity", ledger.capacity_left(base, 3, NARROWEST)
    yield "rows", new.matrix("encoder.layer.0.attention.self.query", NARROWEST)


def _ledger(shop: Workshop, folder: Path) -> None:
    for place, holder in enumerate(("sst", "sts", "sst.probe")):
        Ledger(folder).take(shop.encoder.fingerprint if place < 2 else "0" * 64, holder, 3 + place, NARROWEST)
    (folder / "basis.json.lock").unlink(missing_ok=True)


LEDGER = Format("ledger", {"three": _ledger}, {"basis.json": JSON}, use_ledger)


def _figures(shop: Workshop, task: str) -> Score:
    rows = shop.rows(task)
    return Score(task, get_task(task).metric, 0.5, 0.25, 0.75, len(rows), rows.fingerprint())


def use_scores(shop: Workshop, folder: Path) -> Stages:
    """Read the figures recorded beside models, look at one, put them beside a new figure, and add that."""
    path = folder / "sst.safetensors"
    yield "read", read_record(record_path(path))
    records = find_records([folder, folder / "models"])
    yield "find", records
    yield "inspect", inspected(path)
    found = compare(shop.trio[0], [_figures(shop, "sst")], records)
    shown(as_text(comparison_table(found)))
    strict_json(found.to_json())
    yield "compare", found
    yield (
        "full",
        full_finetuning_scores(records, shop.encoder.fingerprint, {"sst": (get_task("sst"), shop.rows("sst"))}),
    )
    write_record(path, shop.trio[0], [_figures(shop, "sst")])
    yield "add", read_record(record_path(path))


def _scores(shop: Workshop, folder: Path) -> None:
    mb.save(shop.trio[0], folder / "sst.safetensors")
    write_record(folder / "sst.safetensors", shop.trio[0], [_figures(shop, "sst"), _figures(shop, "sts")])
    (folder / "models/sst").mkdir(parents=True)
    full = mb.FullModel(folder / "models/sst", get_task("sst"), 40, Base.of(shop.encoder), {"kind": "full"})
    write_record(full.path, full, [_figures(shop, "sst")])
    (folder / "models/sst/mbert.json").write_text("{}")


SCORES = Format("scores", {"two": _scores}, {"*.scores.json": JSON}, use_scores)

_STEPS = 3
_OUT = "sst.safetensors"


def _train(shop: Workshop, folder: Path, resume: bool, kind: str = "lora") -> mb.Adapter:
    config = AdapterConfig(rank=2, dropout=0.1) if kind == "lora" else None
    control = Control(show=False, resume=resume)
    return train(
        shop.encoder, folder / _OUT, kind=kind, rows=20, control=control, adapter=config, checkpoint_seconds=0.0
    )


def _stopped(kind: str) -> Any:
    def make(shop: Workshop, folder: Path) -> None:
        """A run that was stopped within its second epoch; its clock is set to what it always is."""
        really, count = loop.step, 0

        def step(*arguments: Any) -> float:
            nonlocal count
            count += 1
            if count > _STEPS:
                raise Stopped
            return really(*arguments)

        with patch.object(loop, "step", step), contextlib.suppress(Stopped):
            _train(shop, folder, False, kind)
        _set_clock(run_folder(folder / _OUT) / CHECKPOINT)
        _tidy(folder)

    return make


def _set_clock(checkpoint: Path) -> None:
    """Have a checkpoint tell of the same time on every machine."""
    tensors, told = read_tensors(checkpoint)
    told["progress"]["seconds"] = 0.25
    write_tensors(checkpoint, tensors, told)


def _finished(shop: Workshop, folder: Path) -> None:
    """A finished run, with a manifest that tells of no machine."""
    _train(shop, folder, False)
    path = run_folder(folder / _OUT) / MANIFEST
    told = json.loads(path.read_text())
    write_json(path, {**told, "wall_seconds": 0.25, "peak_memory_bytes": 2**28, "platform": "x", "python": "3"})
    _tidy(folder)


def _tidy(folder: Path) -> None:
    for lock in folder.glob("*.lock"):
        lock.unlink()


def use_run(shop: Workshop, folder: Path) -> Stages:
    """Go on with a run, tell how it went, and let its adapter answer."""
    checkpoint = run_folder(folder / _OUT) / CHECKPOINT
    if checkpoint.exists():
        read_tensors(checkpoint)
        yield "container", None
    kind = "lora" if (folder / "basis.json").exists() else "probe"
    model = _train(shop, folder, True, kind)
    yield "resume", model
    yield "inspect", inspected(folder / _OUT)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        after_training(get_task("sst"), folder / _OUT, str(folder), adapter=model)
    yield "report", shown(said.getvalue()) and None
    yield "predict", answered(shop, model, folder / _OUT)


CHECKPOINTS = Format(
    "checkpoint",
    {"adapter": _stopped("lora"), "probe": _stopped("probe")},
    {f"*.run/{CHECKPOINT}": MODEL},
    use_run,
    share=2,
    digest=True,
)
RUNS = Format(
    "run",
    {"stopped": _stopped("lora"), "finished": _finished},
    {"*.run/run.json": JSON, f"*.run/{MANIFEST}": JSON},
    use_run,
)


def _scored(shop: Workshop, count: int = 12) -> Mapping[str, tuple[Task, Rows]]:
    return {name: (get_task(name), shop.rows(name, count)) for name in ("sst", "sts")}


def use_search(shop: Workshop, folder: Path) -> Stages:
    """Go on with a search of two evaluations that were both finished."""
    inputs = merge_inputs_of(shop.trio[:2])
    path = folder / "merged.search.json"
    model = search.search(inputs, mb.Recipe("fedavg"), _scored(shop), shop.encoder, 2, path=path)
    told = model.trace["search"]
    for one in told["evaluations"]:
        finite(one["score"])
        for value in one["weights"].values():
            finite(value)
    yield "search", [told["evaluations"], told["best"]]
    yield "predict", answered(shop, model, path)


SEARCHES = Format(
    "search", {"two": lambda shop, folder: [*use_search(shop, folder)] and None}, {"*.search.json": JSON}, use_search
)


def _given(shop: Workshop, folder: Path | None = None) -> MergeContext:
    return MergeContext(lambda: shop.encoder, lambda task: dataclasses.replace(shop.rows(task), labels=None), folder)


def use_comparison(shop: Workshop, folder: Path) -> Stages:
    """Add a method to a comparison whose others are read from their files, and show the table."""
    tasks, inputs = _scored(shop), merge_inputs_of(shop.trio[:2])
    comparison = comparison_fingerprint(inputs, shop.encoder, tasks)
    refuse_other_results(folder, comparison, False)
    yield "same", None
    results = run_recipe(mb.Recipe("fedavg"), inputs, shop.encoder, tasks, _given(shop), folder)
    yield "cells", [[one.name, one.refused, one.outputs] for one in results]
    with patch.object(method_comparison, "RESAMPLES", 5):
        rows = comparison_rows(with_earlier_results(results, folder, comparison, tasks), tasks)
    shown(as_text(method_table(rows)))
    yield "table", [[one.result.name, finite(one.overall), one.values] for one in rows]
    found = method_comparison.MethodComparison(rows, None, {}, "dev", {"sst": 12, "sts": 12})
    yield "record", strict_json(method_comparison.to_json(found)) and None


_MERGES = (
    mb.Recipe("ensemble"),
    mb.Recipe("fedavg"),
    mb.Recipe("ties", layers={"encoder.*": {"sst": 0.5}}),
)


def _comparison(shop: Workshop, folder: Path) -> None:
    """Three merges and their table, on a clock that always shows the same."""
    tasks, inputs = _scored(shop), merge_inputs_of(shop.trio[:2])
    for recipe in _MERGES:
        run_recipe(recipe, inputs, shop.encoder, tasks, _given(shop), folder)
    for path in folder.glob("*.safetensors"):
        tensors, told = read_tensors(path)
        write_tensors(path, tensors, {**told, "seconds": 0.25, "memory": 2**20})
    results = [
        one for recipe in _MERGES for one in run_recipe(recipe, inputs, shop.encoder, tasks, _given(shop), folder)
    ]
    with patch.object(method_comparison, "RESAMPLES", 5):
        found = method_comparison.MethodComparison(
            comparison_rows(results, tasks), None, {}, "dev", {"sst": 12, "sts": 12}
        )
    made = {"comparison": comparison_fingerprint(inputs, shop.encoder, tasks), "made_by": made_by()}
    write_json(folder / "table.json", {**method_comparison.to_json(found), **made})


def use_cells(shop: Workshop, folder: Path) -> Stages:
    """Take up finished merges, those that are broken anew, and show them."""
    tasks, inputs = _scored(shop), merge_inputs_of(shop.trio[:2])
    results = [
        one for recipe in _MERGES for one in run_recipe(recipe, inputs, shop.encoder, tasks, _given(shop), folder)
    ]
    yield "cells", [[one.name, one.refused, one.outputs, one.learned] for one in results]
    with patch.object(method_comparison, "RESAMPLES", 5):
        rows = comparison_rows(results, tasks)
    shown(as_text(method_table(rows)))
    yield "table", [[one.result.name, finite(one.overall), one.values] for one in rows]


COMPARISONS = Format("comparison", {"three": _comparison}, {"table.json": JSON}, use_comparison)
CELLS = Format("cell", {"three": _comparison}, {"*.safetensors": MODEL}, use_cells, digest=True)


def use_descent(shop: Workshop, folder: Path) -> Stages:
    """Go on with a merge that learns."""
    recipe = mb.Recipe("adamerging", options={"steps": 4, "batch_size": 4})
    if (path := folder / "merged.run" / CHECKPOINT).exists():
        read_tensors(path)
        yield "container", None
    model = merge(shop.trio[:2], recipe, _given(shop, folder / "merged.run"))
    yield "merge", model
    yield "predict", answered(shop, model, folder)


def _descent(shop: Workshop, folder: Path) -> None:
    """A merge that learns, stopped after two of its four steps; its clock is set to what it always is."""
    really, count = loop.save_checkpoint, 0

    def save(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise Stopped
        really(*arguments)

    with (
        patch.object(loop, "save_checkpoint", save),
        patch.object(learning, "_SAVE_SECONDS", -1.0),
        contextlib.suppress(Stopped),
    ):
        for _ in use_descent(shop, folder):
            pass
    _set_clock(folder / "merged.run" / CHECKPOINT)


DESCENTS = Format("descent", {"two steps": _descent}, {"*.safetensors": MODEL}, use_descent, digest=True)
