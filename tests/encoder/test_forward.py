"""The forward pass over many rows, against a row at a time."""

import dataclasses

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.data import batches
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.forward import forward_rows, scaled
from mergekit_bert.hardware import generator
from tests.tiny import tiny_rows


def test_rows_come_back_in_order_whatever_their_length(
    encoder: mb.Encoder, para: mb.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TOKEN_BUDGET", 300)
    rows = tiny_rows(para, 84)
    model = fresh_classifier(encoder, para, generator(0))
    with torch.no_grad():
        for parameter in model.head().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))
    ticks: list[int] = []
    tokens = tokenise(rows, para, encoder.tokenizer, encoder.max_length, encoder.pad_token)
    found = forward_rows(model, tokens, tick=ticks.append)
    with torch.no_grad():
        expected = [model(**encoder.tokenizer(*row, return_tensors="pt"))[0].numpy() for row in rows.texts]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-5)
    assert found.std(0).min() > 1e-4
    assert len(ticks) > 3
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == len(rows)


def test_values_are_stretched_to_the_range_and_logits_stay() -> None:
    values = np.array([[0.0], [0.5], [1.2]])
    sts = dataclasses.replace(get_task("sts"), range=(-1.0, 3.0))
    np.testing.assert_allclose(scaled(values, sts)[:, 0], [-1.0, 1.0, 3.8])
    assert scaled(values, get_task("sst")) is values
