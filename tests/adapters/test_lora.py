"""LoRA: its formula, its start, and the same outputs as peft's."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, fold
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.hardware import generator
from tests.adapters.helpers import dense64, random_adapter
from tests.composing.helpers import merge
from tests.tiny import tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SITES = FAMILIES.get("lora").sites
assert SITES is not None


def unread() -> Tensor:
    raise AssertionError("LoRA does not read the frozen weight")


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_delta_is_scale_b_a(bert: mb.Encoder, rank: int, stabilized: bool) -> None:
    adapter = random_adapter(bert, rank=rank, alpha=6.0, rank_stabilized=stabilized, basis="random")
    expected = dense64(adapter)
    for site, delta in adapter.deltas().items():
        np.testing.assert_allclose(delta.dense(), expected[site], atol=1e-5)


def test_it_starts_at_zero_with_a_uniform_a(bert: mb.Encoder) -> None:
    config = mb.AdapterConfig(rank=50, basis="random")
    values = SITES.init(config, (30, 400), None, unread, generator(1))
    assert values["A"].shape == (50, 400)
    assert torch.equal(values["B"], torch.zeros(30, 50))
    assert float(values["A"].abs().max()) <= 1 / 20
    assert float(values["A"].std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert float(values["A"].mean()) == pytest.approx(0, abs=1e-3)


def test_with_a_basis_a_is_its_rows() -> None:
    rows = BasisRows(0, 2, 3).matrix("site", 16)
    values = SITES.init(mb.AdapterConfig(rank=3), (8, 16), rows, unread, generator(1))
    assert torch.equal(values["A"], rows)
    assert torch.equal(values["B"], torch.zeros(8, 3))


def inputs(encoder: mb.Encoder) -> dict[str, Tensor]:
    rows = tiny_rows(mb.get_task("para"), 6)
    firsts, seconds = ([row[side] for row in rows.texts] for side in (0, 1))
    return dict(encoder.tokenizer(firsts, seconds, padding=True, return_tensors="pt"))


def hidden(model: nn.Module, given: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model(**given).last_hidden_state.numpy()


def peft_config(adapter: Adapter) -> LoraConfig:
    config = adapter.config
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rank_stabilized,
        target_modules=list(adapter.sites),
        lora_dropout=0.0,
    )


def in_peft(folder: Path, adapters: Sequence[Adapter]) -> PeftModel:
    """The adapters as peft's own, by name."""
    base = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model = get_peft_model(base, peft_config(adapters[0]), adapter_name=adapters[0].name)
    for adapter in adapters:
        if adapter is not adapters[0]:
            model.add_adapter(adapter.name, peft_config(adapter))
        with torch.no_grad():
            for site, values in adapter.tensors.items():
                layer = model.base_model.model.get_submodule(site)
                layer.lora_A[adapter.name].weight.copy_(values["A"])
                layer.lora_B[adapter.name].weight.copy_(values["B"])
    return model.eval()


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "deberta-v2"])
def test_outputs_are_those_of_peft(
    encoders: dict[str, mb.Encoder],
    tiny_folders: dict[str, Path],
    architecture: str,
    targets: str,
    stabilized: bool,
) -> None:
    encoder = encoders[architecture]
    adapter = random_adapter(encoder, rank=4, rank_stabilized=stabilized, targets=targets, basis="random", spread=0.15)
    given = inputs(encoder)
    expected = hidden(in_peft(tiny_folders[architecture], [adapter]), given)
    folded = fold(encoder, Patch(adapter.deltas()))
    np.testing.assert_allclose(hidden(folded.model, given), expected, atol=1e-5)
    beside = classifier(encoder, adapter.task, adapter.head)
    attach(beside, "lora", adapter.tensors, frozenset(), adapter.config, generator(0))
    np.testing.assert_allclose(hidden(beside.encoder, given), expected, atol=1e-5)
    assert np.abs(expected - hidden(encoder.model, given)).max() > 0.02


def test_a_weighted_merge_is_peft_s_concatenation(bert: mb.Encoder, tiny_folders: dict[str, Path]) -> None:
    adapters = [
        random_adapter(bert, task, seed=seed, rank=4, basis="random")
        for seed, task in enumerate(("sst", "sts", "para"))
    ]
    weights = {"sst": 0.5, "sts": 0.3, "para": 1.2}
    model = in_peft(tiny_folders["bert"], adapters)
    model.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type="cat")
    model.set_adapter("merged")
    merged = merge(adapters, "task_arithmetic", copy.deepcopy(weights))
    assert isinstance(merged, mb.Merged)
    given = inputs(bert)
    np.testing.assert_allclose(
        hidden(fold(bert, Patch(merged.deltas)).model, given), hidden(model.eval(), given), atol=1e-5
    )
