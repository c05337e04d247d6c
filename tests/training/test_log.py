"""What a run leaves to read: the log, TensorBoard, and the manifest, whose figures are computed another way here."""

import hashlib
import json
import math
import platform
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bert.data.task import Task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import MissingExtraError, OutputError
from mergekit_bert.tensorfile import read_tensors
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.log import RunLog
from mergekit_bert.training.manifest import Control, run_folder
from tests.tiny import tiny_rows
from tests.training.runs import everything, log, manifest, train, tune


def test_the_manifest_tells_how_the_adapter_was_made(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    options = {"epochs": 3, "patience": 3, "batch_size": 7, "hold_out": 0.1}
    adapter = train(bert, out, head_lr=0.004, weight_decay=0.2, seed=5, **options)
    told, rows = manifest(out), tiny_rows(sst, 60)
    assert told["output"] == "a.safetensors"
    assert told["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    tensors, _ = read_tensors(out)
    stored = sum(tensor.numel() for tensor in tensors.values())  # B and head; A is row numbers
    encoder = sum(p.numel() for p in bert.model.parameters())
    total = encoder + stored + sum(2 * in_features for _, in_features in adapter.sites.values())
    assert told["parameters"] == {
        "trainable": stored,
        "total": total,
        "reduction_percent": pytest.approx(100 - 100 * stored / total, abs=6e-4),
    }
    expected = {
        "examples": 54,
        "held_out": 6,
        "truncated": 0,
        "epochs": 3,
        "steps": 3 * 8,
        "batch_size": 7,
        "lr": 0.01,
        "head_lr": 0.004,
        "weight_decay": 0.2,
        "seed": 5,
        "optimizer": "AdamW",
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "data": rows.fingerprint(),
    }
    assert {key: told["training"][key] for key in expected} == expected
    assert told["training"] == dict(adapter.training)
    assert told["training"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["run"]["base"] == bert.fingerprint
    assert told["run"]["task"] == json.loads(json.dumps(sst.to_json()))
    assert told["run"]["basis"] == {"seed": 0, "start": 0, "count": 2}
    assert [epoch["epoch"] for epoch in told["history"]] == [0, 1, 2]
    assert (told["device"], told["python"]) == ("cpu", platform.python_version())
    assert told["gpu_memory_bytes"] == {"average": None, "maximum": None}
    assert told["wall_seconds"] > 0
    assert told["peak_memory_bytes"] > 2**24


def test_the_manifest_of_a_fine_tuned_folder_counts_everything(bert: Encoder, tmp_path: Path) -> None:
    model = tune(bert, tmp_path / "full", epochs=1)
    tensors = read_plain(tmp_path / "full/model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    told = manifest(tmp_path / "full")
    assert told["parameters"] == {"trainable": count, "total": count, "reduction_percent": 0.0}
    assert model.record["kind"] == "full"
    assert model.base.fingerprint == bert.fingerprint
    assert model.record["training"] == told["training"]


def read_plain(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def test_recommended_rates_are_used_where_none_is_given_and_recorded(bert: Encoder, tmp_path: Path) -> None:
    from mergekit_bert.adapters.family import FAMILIES

    rates = set()
    for kind in ("lora", "probe"):
        train(bert, tmp_path / kind, kind=kind, lr=None, epochs=1)
        training = manifest(tmp_path / kind)["training"]
        record = FAMILIES.get(kind)
        for key, recommended in (("lr", record.lr), ("head_lr", record.head_lr)):
            assert recommended is None or training[key] == recommended
        assert training["lr"] > 0
        rates.add((training["lr"], training["head_lr"]))
    tune(bert, tmp_path / "full", lr=None, epochs=1)
    rates.add((manifest(tmp_path / "full")["training"]["lr"], manifest(tmp_path / "full")["training"]["head_lr"]))
    assert len(rates) == 3


def test_the_log_is_json_lines_with_every_tenth_step_and_every_epoch(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out, rows=150, epochs=3, patience=3, batch_size=8)
    events = log(out)
    steps = [event for event in events if "loss" in event]
    epochs = [event for event in events if "train_loss" in event]
    assert len(steps) + len(epochs) == len(events)
    assert [event["step"] for event in steps] == [10, 20, 30, 40]
    assert [event["step"] for event in epochs] == [15, 30, 45]
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert epochs == manifest(out)["history"]
    for event in steps:
        assert set(event) == {"step", "epoch", "loss", "lr", "seconds"}
        assert all(math.isfinite(value) for value in event.values())
    assert [event["seconds"] for event in steps] == sorted(event["seconds"] for event in steps)
    assert [event["epoch"] for event in steps] == [0, 1, 1, 2]


def test_tensorboard_shows_the_figures_of_the_log(bert: Encoder, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "a.safetensors"
    train(bert, out, rows=120, control=Control(show=False, tensorboard=True))
    board = EventAccumulator(str(run_folder(out) / "tensorboard"))
    board.Reload()
    logged = {(name, event["step"]): event[name] for event in log(out) for name in event if name != "step"}
    shown = {(tag, point.step): point.value for tag in board.Tags()["scalars"] for point in board.Scalars(tag)}
    assert set(shown) == set(logged)
    assert shown == pytest.approx(logged, rel=1e-5)
    assert {"loss", "lr", "train_loss", "held_out_accuracy"} <= {tag for tag, _ in shown}


def test_without_asking_there_is_no_tensorboard(bert: Encoder, tmp_path: Path) -> None:
    train(bert, tmp_path / "a.safetensors", epochs=1)
    assert set(everything(tmp_path / "a.run")) == {"log.jsonl", "manifest.json"}


def test_tensorboard_without_its_package_says_what_to_install(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"install mbert\[tensorboard\]"):
        train(bert, tmp_path / "a.safetensors", control=Control(show=False, tensorboard=True))


def test_the_options_of_a_run_are_all_in_its_manifest(bert: Encoder, tmp_path: Path) -> None:
    import dataclasses

    train(bert, tmp_path / "a", epochs=1, balance=True, head="mean")
    kept = {field.name for field in dataclasses.fields(TrainConfig)} - {"checkpoint_seconds"}
    assert kept <= set(manifest(tmp_path / "a")["training"])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_train_and_are_recorded(bert: Encoder, tmp_path: Path, kind: str, precision: str) -> None:
    out = tmp_path / "a"
    (train if kind == "lora" else tune)(bert, out, "sts", epochs=3, precision=precision, lr=5e-3)
    told = manifest(out)
    name = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert told["training"]["precision"] == told["run"]["precision"] == name
    losses = [epoch["train_loss"] for epoch in told["history"]]
    assert losses[-1] < losses[0]
    file = out if kind == "lora" else out / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float32}  # noqa: SIM118


def test_a_link_where_the_log_should_be_is_refused_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(precious)
    with pytest.raises(OutputError, match=r"log.jsonl: a symbolic link; expected the log of this run"):
        RunLog(tmp_path / "run", 0, False, 0)
    assert precious.read_text() == "mine"
