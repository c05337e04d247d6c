"""What every registered adapter type keeps to."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import TYPES, Adapter, AdapterType, Size
from mergekit_bert.adapters.attach import attach, fold
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.file import check_part, read_adapter, write_adapter
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.hardware import generator
from tests.adapters.helpers import random_adapter, same_adapter, same_tensors

SIZES: tuple[Size, ...] = ((12, 8), (8, 12), (9, 9))
CONFIGS = tuple(
    mb.AdapterConfig(rank=rank, alpha=5.0, rank_stabilized=stabilized)
    for rank in (1, 4)
    for stabilized in (False, True)
)


@pytest.fixture(params=TYPES.names())
def kind(request: pytest.FixtureRequest) -> AdapterType:
    return TYPES.get(request.param)


def made(
    kind: AdapterType, config: mb.AdapterConfig, size: Size, seed: int = 0, basis: bool = False
) -> dict[str, Tensor]:
    rows = BasisRows(0, 0, config.rank).matrix("site", size[1]) if basis else None
    return kind.init(config, size, rows, generator(seed))


def random_values(kind: AdapterType, config: mb.AdapterConfig, size: Size) -> dict[str, Tensor]:
    source = generator(7)
    return {name: v + torch.randn(v.shape, generator=source) for name, v in made(kind, config, size).items()}


def test_it_is_a_frozen_record_that_explains_itself(kind: AdapterType) -> None:
    assert kind.description
    assert kind.source
    assert all(rate is None or 0 < rate < 1 for rate in (kind.lr, kind.head_lr))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_it_makes_the_tensors_that_it_names(
    kind: AdapterType, config: mb.AdapterConfig, size: Size, basis: bool
) -> None:
    values = made(kind, config, size, basis=basis)
    assert {name: tuple(value.shape) for name, value in values.items()} == kind.shapes(config, size)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("size", SIZES)
def test_its_start_follows_from_the_generator_alone(kind: AdapterType, size: Size) -> None:
    torch.manual_seed(1)
    one = made(kind, CONFIGS[-1], size)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same_tensors(made(kind, CONFIGS[-1], size), one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_its_delta_has_the_sites_size_and_can_be_trained(
    kind: AdapterType, config: mb.AdapterConfig, size: Size
) -> None:
    if not kind.has_sites:
        assert kind.shapes(config, size) == {}
        return
    values = random_values(kind, config, size)
    values = {name: value.requires_grad_() for name, value in values.items()}
    delta = kind.delta(values, config)
    assert delta.shape == size
    delta.dense().square().sum().backward()
    for value in values.values():
        assert value.grad is not None
        assert value.grad.abs().max() > 0


@pytest.mark.parametrize("size", SIZES)
def test_training_starts_at_the_encoder_as_it_is(kind: AdapterType, size: Size) -> None:
    if kind.has_sites:
        delta = kind.delta(made(kind, CONFIGS[-1], size), CONFIGS[-1])
        np.testing.assert_allclose(delta.dense(), np.zeros(size), atol=1e-7)


def test_every_trained_tensor_has_a_gradient(kind: AdapterType, bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, kind=kind.name, basis="random")
    model = classifier(bert, adapter.task, adapter.head)
    placed = attach(model, kind.name, adapter.tensors, frozenset(), adapter.config, generator(0))
    if placed:
        model(**bert.tokenizer(["good film", "a cat"], return_tensors="pt")).square().sum().backward()
    for values in placed.values():
        for parameter in values.values():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
    assert bool(placed) == kind.has_sites


def test_beside_the_weights_or_folded_into_them_is_the_same(kind: AdapterType, bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, kind=kind.name)
    inputs = bert.tokenizer(["good film", "the cat likes"], padding=True, return_tensors="pt")
    beside = classifier(bert, adapter.task, adapter.head)
    attach(beside, kind.name, adapter.tensors, frozenset(), adapter.config, generator(0))
    folded = classifier(fold(bert, adapter.deltas(), adapter.shifts), adapter.task, adapter.head)
    with torch.no_grad():
        np.testing.assert_allclose(folded(**inputs), beside(**inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("basis", ["orthogonal", "random"])
def test_its_file_gives_it_back(kind: AdapterType, bert: mb.Encoder, tmp_path: Path, basis: str) -> None:
    one = random_adapter(bert, kind=kind.name, basis=basis, train_bias=True)
    write_adapter(tmp_path / "x", one)
    two = read_adapter(tmp_path / "x")
    assert isinstance(two, Adapter)
    assert same_adapter(one, two)
    check_part("x", two.part(two.name), bert)
    write_adapter(tmp_path / "y", two)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()
