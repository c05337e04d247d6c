"""Stored encoders: the same as loaded ones in all but that they cannot run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_bert as mb
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.load import Base, load_encoder
from mergekit_bert.encoder.sites import linear_layers
from mergekit_bert.encoder.stored import StoredEncoder, open_encoder
from mergekit_bert.errors import EncoderError
from tests.tiny import write_tiny


def test_everything_but_the_module_is_the_same(encoder: mb.Encoder) -> None:
    stored = open_encoder(encoder.name)
    assert isinstance(stored, StoredEncoder)
    assert Base.of(stored) == Base.of(encoder)
    assert stored.max_length == encoder.max_length
    assert linear_layers(stored) == linear_layers(encoder)
    for task in map(mb.get_task, ("sst", "sts")):
        assert head_shapes(stored.config, task) == head_shapes(encoder.config, task)
    assert stored.weights.keys() == encoder.weights.keys()
    for name, weight in encoder.weights.items():
        assert torch.equal(stored.weights[name], weight)
    assert all(parameter.is_meta for parameter in stored.model.parameters())


def test_half_precision_is_read_as_it_is_loaded(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "bf16", "bert")
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    stored = open_encoder(folder)
    assert isinstance(stored, StoredEncoder)
    assert stored.fingerprint == load_encoder(folder).fingerprint


def test_a_folder_that_lacks_weights_is_loaded(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "headless", "bert")
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith("pooler.")}
    save_file(kept, path, {"format": "pt"})
    with pytest.warns(mb.MbertWarning, match="lacks pooler"):
        found = open_encoder(folder)
    assert not isinstance(found, StoredEncoder)
    assert set(found.weights) - set(kept) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_changed_folder_is_opened_anew(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "base", "bert")
    before = open_encoder(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"pooler.dense.bias": tensors["pooler.dense.bias"] + 1}, path, {"format": "pt"})
    after = open_encoder(folder)
    assert before.fingerprint != after.fingerprint
    np.testing.assert_allclose(after.weights["pooler.dense.bias"], tensors["pooler.dense.bias"] + 1)


def test_what_is_no_encoder_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such folder"):
        open_encoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"no model\.safetensors"):
        open_encoder(tmp_path)
