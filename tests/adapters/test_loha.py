"""LoHa: its formula, dense and in factors, its start, and the same outputs, gradients and merged weights as peft's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, get_peft_model
from peft.tuners.loha.layer import Linear
from torch import Tensor, nn
from transformers import AutoModel

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, fold
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.hardware import generator
from tests.adapters.helpers import random_adapter
from tests.adapters.test_dora import ARCHITECTURES, inputs, weighted

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:Unsupported layer type:UserWarning"
)

LOHA = FAMILIES.get("loha")
SITES = LOHA.sites
assert SITES is not None
RANKS = (2, 5)
"""One whose square makes smaller factors than the tiny encoders' layers are, and one whose square does not."""


def unread() -> Tensor:
    raise AssertionError("LoHa does not read the frozen weight")


def in_peft(folder: Path, adapter: Adapter) -> Any:
    assert isinstance(adapter.config, LOHA.options)
    config = LoHaConfig(r=adapter.config.rank, alpha=int(adapter.config.alpha), target_modules=list(adapter.sites))
    base = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for site, values in adapter.tensors.items():
            for name, value in values.items():
                theirs(model, site, name).copy_(value)
    return model.eval()


def theirs(model: Any, site: str, name: str) -> nn.Parameter:
    found: nn.Parameter = getattr(model.base_model.model.get_submodule(site), f"hada_{name}")["default"]
    return found


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(
    encoders: dict[str, mb.Encoder], tiny_folders: dict[str, Path], architecture: str, rank: int
) -> None:
    encoder = encoders[architecture]
    adapter = random_adapter(encoder, kind="loha", rank=rank)
    given, peers = inputs(encoder), in_peft(tiny_folders[architecture], adapter)
    expected = peers(**given).last_hidden_state
    weighted(expected).backward()
    beside = classifier(encoder, adapter.task, adapter.head)
    placed = attach(beside, "loha", adapter.tensors, frozenset(), adapter.config, generator(0))
    found = beside.encoder(**given).last_hidden_state
    weighted(found).backward()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    folded = fold(encoder, Patch(adapter.deltas())).model(**given).last_hidden_state
    torch.testing.assert_close(folded, expected, atol=2e-5, rtol=0)
    assert float((encoder.model(**given).last_hidden_state - expected).detach().abs().max()) > 0.02
    reached = 0
    for site, parameters in placed.items():
        for name, parameter in parameters.items():
            wanted = theirs(peers, site, name).grad
            if wanted is None:  # the pooler, which the last hidden state does not need
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)
            reached += 1
    assert reached >= 4 * 4
    merged = peers.merge_and_unload()
    for site, delta in adapter.deltas().items():
        weight = encoder.model.get_parameter(f"{site}.weight")
        torch.testing.assert_close(weight + delta.dense(), merged.get_parameter(f"{site}.weight"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 4), (3, 9), (4, None)])
def test_its_delta_is_in_factors_of_rank_r_squared_where_they_are_smaller(rank: int, expected: int | None) -> None:
    config = LOHA.options(rank=rank, alpha=3.0)
    source = generator(1)
    values = {name: torch.randn(shape, generator=source) for name, shape in SITES.shapes(config, (24, 18)).items()}
    delta = SITES.delta(values, config, unread)
    assert delta.rank == expected
    wide = {name: value.double().numpy() for name, value in values.items()}
    exact = 3.0 / rank * np.einsum("or,ri,os,si->oi", wide["w1_a"], wide["w1_b"], wide["w2_a"], wide["w2_b"])
    np.testing.assert_allclose(delta.dense(), exact, rtol=1e-4, atol=1e-4)
    assert np.linalg.matrix_rank(exact) == min(rank * rank, 18)


def test_it_starts_as_peft_does(bert: mb.Encoder) -> None:
    values = SITES.init(LOHA.options(rank=50), (200, 400), None, unread, generator(1))
    layer = Linear(nn.Linear(400, 200), "default", LoHaConfig(), r=50, alpha=1)
    for name, value in values.items():
        peers = getattr(layer, f"hada_{name}")["default"].detach()
        assert value.shape == peers.shape
        assert float(value.std()) == pytest.approx(float(peers.std()), rel=0.03)
        assert float(value.abs().max()) == pytest.approx(float(peers.abs().max()), rel=0.03)
    assert not bool(values["w2_b"].any())
