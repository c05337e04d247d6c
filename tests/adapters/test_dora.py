"""DoRA: its formula, its start, and the same outputs, gradients and merged weights as peft's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, fold
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.errors import CompositionError
from mergekit_bert.hardware import generator
from tests.adapters.helpers import random_adapter
from tests.tiny import tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

DORA = FAMILIES.get("dora")
SITES = DORA.sites
assert SITES is not None
ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2")
SQUARE = "encoder.layer.0.attention.self.query"
PARTS = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}


def adapter_of(encoder: mb.Encoder, **options: Any) -> Adapter:
    """A DoRA as training would leave it: magnitudes near the norms of the weights, and not all above them."""
    return random_adapter(encoder, kind="dora", **{"rank": 4, "spread": 0.15, **options})


def inputs(encoder: mb.Encoder) -> dict[str, Tensor]:
    rows = tiny_rows(mb.get_task("para"), 6)
    firsts, seconds = ([row[side] for row in rows.texts] for side in (0, 1))
    return dict(encoder.tokenizer(firsts, seconds, padding=True, return_tensors="pt"))


def in_peft(folder: Path, adapter: Adapter) -> Any:
    config = LoraConfig(
        r=adapter.config.rank,
        lora_alpha=int(adapter.config.alpha),
        use_rslora=adapter.config.rank_stabilized,
        use_dora=True,
        target_modules=list(adapter.sites),
        lora_dropout=0.0,
    )
    base = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for site, values in adapter.tensors.items():
            for name, part in PARTS.items():
                theirs(model, site, part).copy_(values[name])
    return model.eval()


def theirs(model: Any, site: str, part: str) -> nn.Parameter:
    layer = model.base_model.model.get_submodule(site)
    found: nn.Parameter = getattr(layer, part)["default"].weight
    return found


def weighted(hidden: Tensor) -> Tensor:
    """A sum in which every entry has a weight of its own."""
    return (hidden * torch.linspace(-1, 2, hidden.numel()).view(hidden.shape)).sum()


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_peft(
    encoders: dict[str, mb.Encoder], tiny_folders: dict[str, Path], architecture: str, stabilized: bool
) -> None:
    encoder = encoders[architecture]
    adapter = adapter_of(encoder, rank_stabilized=stabilized)
    given, peers = inputs(encoder), in_peft(tiny_folders[architecture], adapter)
    expected = peers(**given).last_hidden_state
    weighted(expected).backward()
    beside = classifier(encoder, adapter.task, adapter.head)
    placed = attach(beside, "dora", adapter.tensors, frozenset(), adapter.config, generator(0))
    found = beside.encoder(**given).last_hidden_state
    weighted(found).backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    folded = fold(encoder, Patch(adapter.deltas())).model(**given).last_hidden_state
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)
    bare = encoder.model(**given).last_hidden_state
    assert float((bare - expected).detach().abs().max()) > 0.02
    reached = 0
    for site, parameters in placed.items():
        for name, parameter in parameters.items():
            wanted = theirs(peers, site, PARTS[name]).grad
            if wanted is None:  # the pooler, which the last hidden state does not need
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            scale = float(wanted.abs().max())
            assert scale > 0
            torch.testing.assert_close(parameter.grad, wanted, atol=2e-4 * scale, rtol=0)
            reached += 1
    assert reached >= 3 * len(encoder.config.to_dict().get("layer_types", [0, 0])) * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_weights_are_those_that_peft_merges(
    encoders: dict[str, mb.Encoder], tiny_folders: dict[str, Path], architecture: str
) -> None:
    encoder = encoders[architecture]
    adapter = adapter_of(encoder)
    merged = in_peft(tiny_folders[architecture], adapter).merge_and_unload()
    for site, delta in adapter.deltas().items():
        weight = encoder.model.get_parameter(f"{site}.weight")
        torch.testing.assert_close(weight + delta.dense(), merged.get_parameter(f"{site}.weight"), atol=2e-6, rtol=1e-5)
        assert float(delta.dense().abs().max()) > 1e-2


def test_the_norm_of_every_row_is_its_magnitude(bert: mb.Encoder) -> None:
    adapter = adapter_of(bert)
    for site, delta in adapter.deltas().items():
        changed = bert.model.get_parameter(f"{site}.weight").double() + delta.dense().double()
        lengths = torch.linalg.vector_norm(changed, dim=1)
        np.testing.assert_allclose(lengths, adapter.tensors[site]["m"].double().abs(), rtol=1e-5, atol=1e-6)


def test_it_starts_at_the_norms_of_the_weight_and_changes_nothing(bert: mb.Encoder) -> None:
    weight = torch.randn(30, 400, generator=generator(2))
    values = SITES.init(DORA.options(rank=3), (30, 400), None, lambda: weight, generator(1))
    assert torch.equal(values["B"], torch.zeros(30, 3))
    np.testing.assert_allclose(values["m"], weight.double().square().sum(1).sqrt(), rtol=1e-6)


def test_a_row_of_zeros_stays_one_and_gives_no_nan() -> None:
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    linear.requires_grad_(False)
    config = DORA.options(rank=2)
    values = SITES.init(config, (4, 6), None, lambda: linear.weight, generator(0))
    assert not bool(SITES.delta(values, config, lambda: linear.weight).dense()[1].any())
    layer = SITES.module(linear, values, frozenset(), config, generator(0))
    x = torch.randn(5, 6, generator=generator(1))
    out = layer(x)
    torch.testing.assert_close(out, linear(x), atol=1e-6, rtol=0)
    out.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in layer.parameters()
        if parameter.requires_grad
    )


def test_its_file_needs_no_weights_and_says_what_it_needs_when_it_does(bert: mb.Encoder, tmp_path: Path) -> None:
    one, other = adapter_of(bert), random_adapter(bert, rank=4)
    mb.save(one, tmp_path / "dora.safetensors")
    mb.save(other, tmp_path / "lora.safetensors")
    small, large = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("lora", "dora"))
    own = sum(4 * inner + out for out, inner in one.sites.values())  # values of A, of rank 4, and of m
    assert large < small + 4 * own + 20_000
    read = mb.load(tmp_path / "dora.safetensors")
    assert isinstance(read, Adapter)
    assert read.needs_base
    with pytest.raises(CompositionError, match=r"depend on the base's weights.*put it on its base"):
        read.part("sst")
    assert read.on(bert).deltas().keys() == one.sites.keys()


@pytest.mark.parametrize(("name", "found"), [("no.such.layer", "nothing there"), (SQUARE, r"\(32, 32\)")])
def test_a_site_that_the_base_has_not_is_told_before_it_is_computed(
    bert: mb.Encoder, tmp_path: Path, name: str, found: str
) -> None:
    one = adapter_of(bert, targets="qv")
    size = (32, 16)
    tensors = {"A": torch.ones(4, 16), "B": torch.ones(32, 4), "m": torch.ones(32)}
    mb.save(replace(one, sites={name: size}, tensors={name: tensors}), tmp_path / "a.safetensors")
    for use in (lambda path: mb.predictor(path, base=bert), lambda path: mb.merge([path], "fedavg", base=bert)):
        with pytest.raises(CompositionError, match=rf"site '{name}' of shape \(32, 16\); expected {found}"):
            use(tmp_path / "a.safetensors")
