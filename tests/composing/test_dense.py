"""Dense folders: what transformers makes of them is what mbert says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mergekit_bert as mb
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import train_adapter
from tests.tiny import tiny_rows


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
