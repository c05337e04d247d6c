"""Rows of many tasks in one batch: every answer is the one that the row gets alone, by the folded adapter."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach_routed
from mergekit_bert.adapters.delta import Dense
from mergekit_bert.data.batches import tokenise
from mergekit_bert.encoder import packing
from mergekit_bert.errors import CompositionError, DataError, EncoderError
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.models.routing import Mixture
from tests.adapters.helpers import random_adapter, renamed
from tests.composing.helpers import merge, trio
from tests.tiny import tiny_rows

Request = tuple[str, tuple[str, ...]]


def many(encoder: mb.Encoder, count: int) -> list[Adapter]:
    """Adapters of all kinds: ranks, targets, shifts, label counts, probes, and prefixes and prompts of many lengths."""
    made, kinds = [], ["lora", "prefix", "lora", "prompt", "lora+prefix", "lora+prompt", "probe"]
    if not packing.enabled(encoder.model):
        kinds = [kind.replace("prefix", "prompt") for kind in kinds]
    for number in range(count):
        task, kind = ("sst", "sts", "para")[number % 3], kinds[number % 7]
        options = {
            "rank": (2, 5, 3)[number % 3 if number % 2 else 0],
            "targets": ("all-linear", "qv", "attention")[number % 3],
            "train_bias": number % 4 == 1,
            "train_layernorm": number % 5 == 2,
            "basis": "random",
            "length": 1 + number % 5,
            "place": ("before", "after")[number % 2],
        }
        one = random_adapter(encoder, task, seed=number, kind=kind, **options)  # type: ignore[arg-type]
        made.append(renamed(one, f"{task}_{number}"))
    return made


def requests_of(adapters: Sequence[Adapter], each: int) -> list[Request]:
    """``each`` rows for every adapter, shuffled."""
    found = [
        (one.name, texts) for number, one in enumerate(adapters) for texts in tiny_rows(one.task, each, number).texts
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(each)).tolist()
    return [found[place] for place in order]


def answers(predictor: Predictor, requests: Sequence[Request]) -> list[np.ndarray]:
    return [np.array(one.outputs) for one in predictor.mixed(requests)]


def alone(predictor: Predictor, requests: Sequence[Request]) -> list[np.ndarray]:
    return [np.array(predictor.predict(task, [texts])[0].outputs) for task, texts in requests]


def check(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5 * max(1.0, float(np.abs(two).max())))


def test_in_every_architecture(encoder: mb.Encoder) -> None:
    predictor = Predictor(merge(many(encoder, 7), "ensemble"), encoder)
    requests = requests_of(many(encoder, 7), 3)
    check(answers(predictor, requests), alone(predictor, requests))


@pytest.mark.parametrize("count", [1, 2, 5, 8, 21, 64])
def test_from_one_adapter_to_many(bert: mb.Encoder, count: int) -> None:
    adapters = many(bert, count)
    predictor = Predictor(merge(adapters, "ensemble"), bert)
    requests = requests_of(adapters, 2)
    expected = alone(predictor, requests)
    assert np.std(np.concatenate(expected)) > 0.1
    check(answers(predictor, requests), expected)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=30))
def test_in_any_company(bert: mb.Encoder, drawn: list[tuple[int, int]]) -> None:
    adapters = many(bert, 9)
    predictor = Predictor(merge(adapters, "ensemble"), bert)
    requests = [(adapters[n].name, tiny_rows(adapters[n].task, 6, n).texts[row]) for n, row in drawn]
    check(answers(predictor, requests), alone(predictor, requests))


@pytest.mark.parametrize("method", ["fedavg", "orthoada"])
def test_a_merged_model_too(bert: mb.Encoder, method: str) -> None:
    adapters = trio(bert, train_bias=True)
    predictor = Predictor(merge(adapters, method), bert)
    requests = requests_of(adapters, 5)
    check(answers(predictor, requests), alone(predictor, requests))


def test_dense_deltas_too(bert: mb.Encoder) -> None:
    one = random_adapter(bert, "sst")
    part = one.part("sst")
    dense = dataclasses.replace(part, deltas={site: Dense(delta.dense()) for site, delta in part.deltas.items()})
    tokens = tokenise(tiny_rows(one.task, 6), one.task, bert.tokenizer, 40, bert.pad_token)
    owners = [0, 1, 0, 1, 1, 0]
    found = Mixture(bert, [part, dense]).outputs(tokens, owners)
    expected = Mixture(bert, [part]).outputs(tokens, [0] * 6)
    check(found, expected)


def test_threads_do_not_disturb_each_other(bert: mb.Encoder) -> None:
    adapters = many(bert, 6)
    predictor = Predictor(merge(adapters, "ensemble"), bert)
    requests = requests_of(adapters, 4)
    shares = [requests[start::8] for start in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda share: answers(predictor, share), shares * 4))
    for share, one in zip(shares * 4, found, strict=True):
        check(one, alone(predictor, share))


def test_a_routed_module_asks_whose_the_rows_are(bert: mb.Encoder) -> None:
    tree = attach_routed(bert, [random_adapter(bert, "sst").part("sst")])
    with pytest.raises(RuntimeError, match="needs a layout with adapters"):
        tree(**bert.tokenizer("good film", return_tensors="pt"))


def test_an_architecture_that_is_not_packed_is_refused(encoders: dict[str, mb.Encoder]) -> None:
    encoder = encoders["deberta-v2"]
    with pytest.raises(EncoderError, match="an architecture that is not packed; expected one that is; go task by task"):
        Mixture(encoder, [random_adapter(encoder, "sst").part("sst")])


def test_a_callers_autocast_changes_nothing(bert: mb.Encoder) -> None:
    adapters = many(bert, 8)
    predictor = Predictor(merge(adapters, "ensemble"), bert)
    requests = requests_of(adapters, 2)
    expected = answers(predictor, requests)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(predictor, requests)
    for one, two in zip(found, expected, strict=True):
        assert np.array_equal(one, two)


def test_pieces_of_tokens_and_of_rows() -> None:
    layout = packing.Layout((2, 3, 4), torch.device("cpu"), (0, 2, 2))
    with packing.laid_out(layout):
        assert packing.pieces(torch.zeros(1, 9, 5)) == [(0, 0, 2), (2, 2, 9)]
        with pytest.raises(RuntimeError, match="got 12 vectors"):
            packing.pieces(torch.zeros(3, 4, 5))
        assert packing.pieces(torch.zeros(3, 5)) == packing.pieces(torch.zeros(3, 1, 5)) == [(0, 0, 1), (2, 1, 3)]


def test_no_requests_no_answers_and_wrong_ones_are_told(bert: mb.Encoder) -> None:
    predictor = Predictor(merge(many(bert, 3), "ensemble"), bert)
    assert predictor.mixed([]) == []
    with pytest.raises(CompositionError, match="'none'"):
        predictor.mixed([("none", "good")])
    with pytest.raises(DataError, match="2 texts in a row"):
        predictor.mixed([("sst_0", ("good", "bad"))])
