"""Model folders: whole, readable by transformers alone, and refused when broken."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_bert as mb
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.folder import load_folder, read_folder, scale_head, write_folder
from mergekit_bert.encoder.load import Base
from mergekit_bert.errors import EncoderError, ModelFileError
from mergekit_bert.hardware import generator


@pytest.fixture(scope="module")
def written(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "sts"
    task = mb.get_task("sts")
    record = {"kind": "full", "base": dataclasses.asdict(Base.of(bert)), "max_length": 33}
    write_folder(path, fresh_classifier(bert, task, generator(4)), bert, task, record)
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "sts"))


def test_the_range_of_a_regression_is_folded_into_the_last_layer(bert: mb.Encoder, written: Path) -> None:
    task = mb.get_task("sts")
    before = fresh_classifier(bert, task, generator(4))
    after, tokenizer = load_folder(read_folder(written))
    inputs = tokenizer(["good film", "a cat"], ["bad film", "the dog sees"], padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(after(**inputs), 5 * before(**inputs), atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 5.0), (-2.0, 3.0), (1.0, 1.5)])
def test_scaling_maps_zero_and_one_to_the_bounds(bert: mb.Encoder, bounds: tuple[float, float]) -> None:
    task = dataclasses.replace(mb.get_task("sts"), range=bounds)
    model = fresh_classifier(bert, task, generator(0))
    inputs = bert.tokenizer(["good film"], return_tensors="pt")
    with torch.no_grad():
        before = float(model(**inputs))
        scale_head(model, task)
        assert float(model(**inputs)) == pytest.approx(bounds[0] + (bounds[1] - bounds[0]) * before, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"basis": {"a": 1}},
        {"config": {"a": 1}},
        {"type": "lora", "config": {"rank": "3"}},
        {"training": {"examples": -1}},
        {"training": {"more": 1}},
    ],
)
def test_what_the_record_says_of_an_adapter_is_checked(folder: Path, change: dict[str, object]) -> None:
    path = folder / "mbert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFileError, match=r"mbert\.json: broken metadata .*; expected metadata as mbert writes it"):
        mb.load(folder)


def test_a_token_that_the_model_does_not_know_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["vocab"]["film"] = 5000
    path.write_text(json.dumps(rules))
    with pytest.raises(EncoderError, match="tokenizer: 5000 in input_ids; expected numbers below"):
        mb.predictor(folder).predict("sts", [("good film", "a cat")])


def test_a_configuration_that_cannot_run_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_size_feed_forward": "albert"}))
    with pytest.raises(ModelFileError, match="it cannot be loaded"):
        load_folder(read_folder(folder))


def test_the_head_of_a_classification_is_left_alone(bert: mb.Encoder, sst: mb.Task) -> None:
    model = fresh_classifier(bert, sst, generator(0))
    before = {name: value.clone() for name, value in model.head().items()}
    scale_head(model, sst)
    assert all(torch.equal(before[name], value) for name, value in model.head().items())


def test_the_record_comes_back(bert: mb.Encoder, written: Path, sts: mb.Task) -> None:
    model = read_folder(written)
    assert model.task == dataclasses.replace(sts, hub=None)
    assert (model.max_length, model.tasks) == (33, (model.task,))
    assert model.base == Base.of(bert)
    assert model.seen() == [], "a folder that tells of no rows has seen none since its training"


def _edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "mbert.json").read_text())
        for key, value in changes.items():
            record.pop(key) if value is None else record.update({key: value})
        (folder / "mbert.json").write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "mbert.json").unlink(), "no such file"),
        (lambda folder: (folder / "mbert.json").write_text("{"), "broken"),
        (lambda folder: (folder / "mbert.json").write_bytes(b"\xff\xfe"), "broken"),
        (lambda folder: (folder / "mbert.json").write_text("[]"), "broken"),
        (_edit(format=2), "broken .format version 2"),
        (_edit(task=None), "broken"),
        (_edit(task=[1]), "broken"),
        (_edit(task={"name": "x"}), "broken"),
        (_edit(base=None), "broken"),
        (_edit(max_length="long"), "broken"),
        (_edit(max_length=float("inf")), "broken"),
        (_edit(seen=[{"step": "search", "texts": []}]), "broken .seen.0.fingerprint: field required"),
        (_edit(seen=7), "broken"),
    ],
)
def test_a_broken_record_is_one_line(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_folder(folder)
    assert "mbert.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def _without_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("classifier")}
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors; expected weights in safetens"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 5), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (_without_head, "weights are missing .classifier.bias, classifier.weight"),
    ],
)
def test_broken_weights_are_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_folder(read_folder(folder))
    assert "\n" not in str(caught.value)
