"""Dense folders: what transformers makes of them is what mbert says."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mergekit_bert as mb
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.patch import Part
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.folder import folder_in_parts, read_folder, write_folder
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import CompositionError, ModelFileError, OutputError
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.hardware import generator
from mergekit_bert.tensorfile import StoredTensors, tensors_in_any_order
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import random_adapter, same_tensors
from tests.composing.helpers import merged, trio
from tests.tiny import tiny_rows, write_tiny


@pytest.mark.parametrize("method", ["fedavg", "ensemble"])
def test_transformers_gives_the_same_predictions(encoder: mb.Encoder, tmp_path: Path, method: str) -> None:
    adapters = []
    for name in ("sst", "sts"):
        task = mb.get_task(name)
        config = mb.AdapterConfig(rank=3, train_bias=True, train_layernorm=True, alpha=12.0)
        train = mb.TrainConfig(epochs=1, batch_size=8, lr=0.02)
        adapters.append(
            train_adapter(
                encoder,
                task,
                tiny_rows(task, 40),
                tmp_path / f"{name}.safetensors",
                "lora",
                config,
                train,
                Control(show=False),
            )
        )
    model = mb.merge(adapters, method)
    folders = mb.export(model, tmp_path / "dense", base=encoder)
    assert [folder.name for folder in folders] == ["sst", "sts"]
    for folder in folders:
        task = mb.get_task(folder.name)
        rows = tiny_rows(task, 12, seed=5)
        hf = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(
            *[list(column) for column in zip(*rows.texts, strict=True)], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = hf(**inputs).logits.numpy()
        found = mb.predictor(model, base=encoder).outputs(task.name, rows)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert expected.std() > 1e-4
        if task.kind == "classify":
            assert list(hf.config.id2label.values()) == list(task.label_names)


def folded(encoder: mb.Encoder, part: Part) -> dict[str, torch.Tensor]:
    """The encoder's weights with a part's Deltas and shifts."""
    return dict(fold(encoder, part).weights)


@pytest.mark.parametrize("task_name", ["sst", "sts"])
def test_a_folder_in_parts_is_what_save_pretrained_writes(encoder: mb.Encoder, tmp_path: Path, task_name: str) -> None:
    adapter = random_adapter(encoder, task_name, train_bias=True, train_layernorm=True)
    task, part = adapter.task, adapter.part(task_name)
    record = {"kind": "dense", "base": {}, "max_length": 17}
    whole = fold(encoder, part)
    write_folder(tmp_path / "whole", classifier(whole, task, part.head), encoder, task, record)
    with folder_in_parts(tmp_path / "parts", part.head, encoder, task, record) as put:
        for name, weight in reversed(folded(encoder, part).items()):  # in any order
            put(name, weight)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in files:
        if name != "model.safetensors":
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "parts"))
    assert same_tensors(one, two)


@pytest.mark.parametrize("method", ["fedavg", "ensemble"])
def test_stored_and_loaded_encoders_give_the_same_files(bert: mb.Encoder, tmp_path: Path, method: str) -> None:
    model = merge(trio(bert, train_bias=True), Recipe(method))
    loaded = write_dense(tmp_path / "loaded", model, bert)
    stored = write_dense(tmp_path / "stored", model, open_encoder(bert.name))
    for one, two in zip(loaded, stored, strict=True):
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert (one / "mbert.json").read_text() == (two / "mbert.json").read_text()


def test_a_folder_tells_of_the_rows_that_its_task_has_seen(bert: mb.Encoder, tmp_path: Path) -> None:
    rows = {name: tiny_rows(mb.get_task(name), 7, seed=place) for place, name in enumerate(("sst", "sts"))}
    told = {name: one.record() for name, one in rows.items()}
    trace = {"search": {"rows": told}, "calibrated": {"heads": {"rows": {"sst": told["sst"]}}}}
    model = dataclasses.replace(merged(trio(bert), "fedavg"), trace=trace)
    found = {path.name: read_folder(path).seen() for path in write_dense(tmp_path, model, open_encoder(bert.name))}
    assert found == {name: [one for one in model.seen() if one[1] == name] for name in ("sst", "sts", "para")}
    assert [step for step, *_ in found["sst"]] == ["search", "heads"]
    assert found["sts"] == [("search", "sts", rows["sts"].fingerprint(), frozenset(rows["sts"].hashes()))]
    assert found["para"] == []


def test_one_task_may_be_written_alone(bert: mb.Encoder, tmp_path: Path) -> None:
    model = merge(trio(bert), Recipe("fedavg"))
    assert mb.export(model, tmp_path, base=bert, tasks=["sts"]) == [tmp_path / "sts"]
    assert [path.name for path in tmp_path.iterdir()] == ["sts"]
    with pytest.raises(CompositionError, match="'cola'"):
        mb.export(model, tmp_path, base=bert, tasks=["cola"])


def test_a_failure_on_the_way_leaves_nothing(bert: mb.Encoder, tmp_path: Path) -> None:
    (one,) = trio(bert)[:1]
    shifts = {"encoder.layer.1.output.LayerNorm.bias": torch.full((32,), torch.inf)}
    broken = dataclasses.replace(one, shifts=shifts)
    with pytest.raises(OutputError, match=r"LayerNorm.bias' would hold NaN or values"):
        write_dense(tmp_path, broken, open_encoder(bert.name))
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(bert: mb.Encoder, tmp_path: Path) -> None:
    other = open_encoder(write_tiny(tmp_path / "other", "bert", seed=5))
    with pytest.raises(ModelFileError, match="made for base"):
        write_dense(tmp_path / "out", merge(trio(bert), Recipe("fedavg")), other)
    assert not (tmp_path / "out").exists()


def test_tensors_in_any_order_are_checked(tmp_path: Path) -> None:
    shapes = {"b": (2, 3), "a": (), "c": (4,)}
    values = {name: torch.randn(shape, generator=generator(1)) for name, shape in shapes.items()}
    with tensors_in_any_order(tmp_path / "x.safetensors", shapes) as put:
        for name in ("c", "a", "b"):
            put(name, values[name])
        with pytest.raises(ValueError, match="second time"):
            put("a", values["a"])
        with pytest.raises(ValueError, match=r"b: torch.float32"):
            put("b", values["c"])
    assert same_tensors(load_file(tmp_path / "x.safetensors"), values)
    with (
        pytest.raises(ValueError, match="never put: a, b"),
        tensors_in_any_order(tmp_path / "y.safetensors", shapes) as put,
    ):
        put("c", values["c"])


def test_a_file_that_reads_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredTensors.__getitem__
    monkeypatch.setattr(StoredTensors, "__getitem__", lambda stored, name: read(stored, name) + 1e-7)
    with (
        pytest.raises(OutputError, match="what was read back differs"),
        tensors_in_any_order(tmp_path / "x.safetensors", {"a": (3,)}) as put,
    ):
        put("a", torch.ones(3))
