"""Short training runs for the tests of this folder."""

import json
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.manifest import Control, run_folder
from mergekit_bert.training.run import finetune, train_adapter
from tests.tiny import tiny_rows

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "hold_out": 0.2, "lr": 0.01, "precision": "fp32"}


def quick(**options: Any) -> TrainConfig:
    """A short run's options."""
    return TrainConfig(**(QUICK | options))


def train(
    encoder: Encoder,
    out: Path,
    task: str | Task = "sst",
    kind: str = "lora",
    rows: int = 60,
    control: Control | None = None,
    adapter: AdapterConfig | None = None,
    **options: Any,
) -> Adapter:
    """A tiny adapter of family ``kind``."""
    family = FAMILIES.get(kind)
    found, config = get_task(task), adapter or family.options(**({"rank": 2} if family.sites else {}))
    control = control or Control(show=False)
    return train_adapter(encoder, found, tiny_rows(found, rows), out, kind, config, quick(**options), control)


def tune(
    encoder: Encoder,
    out: Path,
    task: str | Task = "sst",
    rows: int = 60,
    control: Control | None = None,
    **options: Any,
) -> FullModel:
    """A tiny model fine-tuned whole."""
    found = get_task(task)
    return finetune(encoder, found, tiny_rows(found, rows), out, quick(**options), control or Control(show=False))


def manifest(out: Path) -> dict[str, Any]:
    """The manifest of the run that made ``out``."""
    value: dict[str, Any] = json.loads((run_folder(out) / "manifest.json").read_text())
    return value


def log(out: Path) -> list[dict[str, Any]]:
    """The log of the run that made ``out``."""
    return [json.loads(line) for line in (run_folder(out) / "log.jsonl").read_text().splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_seconds(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log events that equal runs share."""
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events]
