"""The quickstart: adapters, probes and full fine-tuning for several tasks, three compositions, one table, one picture.

Like the command line it stands above all wings.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from mergekit_bert import api
from mergekit_bert.adapters.config import USUAL
from mergekit_bert.data.source import SAMPLE, load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.evaluation.comparison import Grid, grid_of
from mergekit_bert.evaluation.pictures import heatmap, write_picture
from mergekit_bert.evaluation.records import read_record, record_path
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_markdown, as_text, grid_table
from mergekit_bert.files import write_atomic
from mergekit_bert.terminal import say, say_lines
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.manifest import is_finished

_METHODS = ("fedavg", "orthoada", "ensemble")
_PLACES = {"probe": "adapters/{}.probe.safetensors", "full": "models/{}", "adapters": "adapters/{}.safetensors"}
MODELS = (*_PLACES, *_METHODS)
"""The columns of the table."""
_SAMPLE_EPOCHS = {"probe": 1, "full": 2, "adapters": 2}
"""Shorter training on the generated corpus, so that all is done in a few minutes."""


def quickstart(data: str, base: str, out: Path, tasks: Sequence[str], seed: int = 0, force: bool = False) -> Grid:
    """Run the main job into the folder ``out``, print and draw the table.

    What is finished there is reused, unless ``force``.
    """
    started = time.monotonic()
    encoder = load_encoder(base)
    measured: dict[str, list[Score]] = {role: [] for role in _PLACES}
    for role in _PLACES:
        for task in tasks:
            path = model_path(out, role, task)
            reused = is_finished(path) and not force
            _train(role, task, data, path, encoder, seed, force)
            say(f"{'reused' if reused else 'trained'} {path}")
            measured[role] += _measure(path, data, encoder)
    for method in _METHODS:
        path = model_path(out, method)
        api.save(api.merge([model_path(out, "adapters", task) for task in tasks], method), path, force=True)
        say(f"merged {path}")
        measured[method] = _measure(path, data, encoder)
    grid = grid_of([get_task(task) for task in tasks], measured)
    say_lines(as_text(grid_table(grid)))
    write_atomic(out / "table.md", as_markdown(grid_table(grid)).encode())
    write_picture(heatmap(grid, "full", f"{base} on {data}"), out / "heatmap.png")
    say(f"wrote {out / 'table.md'} and {out / 'heatmap.png'}; {time.monotonic() - started:.0f} s in all")
    return grid


def _measure(path: Path, data: str, encoder: Encoder) -> list[Score]:
    """The model's figures on the dev rows: those recorded beside it, or measured now."""
    tasks, record = api.load(path).tasks, read_record(record_path(path))
    rows = {task.name: load_rows(task, "dev", data).fingerprint() for task in tasks}
    known = [score for score in (record.scores if record else ()) if rows.get(score.task) == score.data]
    if len(known) == sum(len(task.metrics) for task in tasks):
        return known
    return list(api.evaluate(path, data, base=encoder, progress=True).scores)


def model_path(out: Path, model: str, task: str = "") -> Path:
    """Where the quickstart into ``out`` puts a model; compositions answer every task."""
    return out / _PLACES.get(model, f"{model}.safetensors").format(task)


def _train(role: str, task: str, data: str, path: Path, encoder: Encoder, seed: int, force: bool) -> None:
    """Train one model, go on with it, or find it finished."""
    train = TrainConfig(seed=seed)
    if data == SAMPLE:
        train = dataclasses.replace(train, epochs=_SAMPLE_EPOCHS[role])
    if role == "full":
        api.finetune(task, data, path, base=encoder, train=train, resume=not force, force=force, progress=True)
    else:
        kind = "probe" if role == "probe" else USUAL
        api.train_adapter(
            task, data, path, base=encoder, type=kind, train=train, resume=not force, force=force, progress=True
        )
