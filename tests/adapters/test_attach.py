"""Attaching and folding: the same outputs both ways, and an encoder that nobody edits."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import (
    attach,
    cast_frozen,
    dropout_on,
    fold,
    set_head_dropout,
    unfreeze,
)
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.linear import AdaptedLinear, SeededDropout
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.encoder.classifier import classifier, fresh_classifier, share
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.sites import shift_names
from mergekit_bert.hardware import generator
from tests.adapters.helpers import random_adapter
from tests.tiny import tiny_rows

SITED = [record.name for record in FAMILIES if record.sites]
BASES = [(name, "random") for name in SITED] + [("lora", "orthogonal")]


def inputs(encoder: mb.Encoder) -> dict[str, Tensor]:
    rows = tiny_rows(mb.get_task("para"), 6)
    firsts, seconds = ([row[side] for row in rows.texts] for side in (0, 1))
    return dict(encoder.tokenizer(firsts, seconds, padding=True, return_tensors="pt"))


def outputs(model: nn.Module, encoder: mb.Encoder) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs(encoder)).numpy()


def attached(encoder: mb.Encoder, adapter: Adapter) -> Classifier:
    model = classifier(fold(encoder, Patch(shifts=adapter.shifts)), adapter.task, adapter.head)
    attach(model, adapter.type, adapter.tensors, frozenset(), adapter.config, generator(0))
    return model


def folded(encoder: mb.Encoder, adapter: Adapter) -> Classifier:
    return classifier(fold(encoder, adapter.part(adapter.name)), adapter.task, adapter.head)


@pytest.mark.parametrize(("kind", "basis"), sorted(BASES))
def test_an_adapter_beside_the_weights_is_one_folded_into_them(encoder: mb.Encoder, kind: str, basis: str) -> None:
    adapter = random_adapter(encoder, kind=kind, basis=basis, train_bias=True, train_layernorm=True)
    beside, inside = outputs(attached(encoder, adapter), encoder), outputs(folded(encoder, adapter), encoder)
    bare = outputs(classifier(encoder, adapter.task, adapter.head), encoder)
    scale = max(1.0, float(np.abs(beside).max()))
    np.testing.assert_allclose(inside, beside, atol=2e-5 * scale)
    assert np.abs(inside - bare).max() > 0.01


def test_folding_adds_to_each_tensor_what_it_is_told(encoder: mb.Encoder) -> None:
    adapter = random_adapter(encoder, train_bias=True, train_layernorm=True, basis="random")
    tree = fold(encoder, adapter.part(adapter.name)).model
    deltas = {f"{site}.weight": delta.dense() for site, delta in adapter.deltas().items()}
    for name, old in encoder.model.named_parameters():
        new = tree.get_parameter(name)
        if name in deltas or name in adapter.shifts:
            change = deltas[name] if name in deltas else adapter.shifts[name]
            assert torch.equal(new, old + change)
        else:
            assert new.data_ptr() == old.data_ptr()
        assert not new.requires_grad


def test_folding_adds_to_a_bfloat16_encoder_in_float32(bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, spread=1e-3)
    half = dataclasses.replace(bert, model=share(bert.model))
    cast_frozen(half.model, torch.bfloat16)
    tree = fold(half, Patch(adapter.deltas())).model
    for site, delta in adapter.deltas().items():
        old, new = half.model.get_parameter(f"{site}.weight"), tree.get_parameter(f"{site}.weight")
        assert (old.dtype, new.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(new, old.float() + delta.dense())


def state(encoder: mb.Encoder) -> tuple[list[str], dict[str, tuple[Tensor, int, bool]]]:
    """Everything that could be edited: modules, and the values, places and flags of tensors."""
    modules = [f"{name} {type(module).__name__} {module.training}" for name, module in encoder.model.named_modules()]
    tensors = dict(encoder.model.named_parameters()) | dict(encoder.model.named_buffers())
    return modules, {name: (t.detach().clone(), t.data_ptr(), t.requires_grad) for name, t in tensors.items()}


@pytest.fixture
def untouched(encoder: mb.Encoder) -> Iterator[None]:
    modules, tensors = state(encoder)
    yield
    after, later = state(encoder)
    assert after == modules
    assert later.keys() == tensors.keys()
    for name, (value, place, flag) in tensors.items():
        assert torch.equal(later[name][0], value), name
        assert later[name][1:] == (place, flag), name


def _train(model: Classifier, encoder: mb.Encoder) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    model(**inputs(encoder)).square().sum().backward()
    with torch.no_grad():
        for parameter in trained:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)


def _attach(encoder: mb.Encoder) -> None:
    adapter = random_adapter(encoder)
    model = classifier(encoder, adapter.task, adapter.head)
    attach(model, "lora", adapter.tensors, frozenset({"A"}), adapter.config, generator(0))
    _train(model, encoder)


def _unfreeze(encoder: mb.Encoder) -> None:
    model = fresh_classifier(encoder, mb.get_task("sst"), generator(0))
    names = shift_names(model.encoder, bias=False, layernorm=True)
    assert set(unfreeze(model.encoder, names)) == set(names)
    _train(model, encoder)


def _fold(encoder: mb.Encoder) -> None:
    adapter = random_adapter(encoder, train_bias=True, train_layernorm=True)
    tree = fold(encoder, adapter.part(adapter.name)).model
    with torch.no_grad():
        for name in [f"{site}.weight" for site in adapter.sites] + list(adapter.shifts):
            tree.get_parameter(name).zero_()


def _cast(encoder: mb.Encoder) -> None:
    model = fresh_classifier(encoder, mb.get_task("sst"), generator(0))
    cast_frozen(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    dropout_on(model, True)
    model.train()


@pytest.mark.parametrize("edit", [_attach, _unfreeze, _fold, _cast])
@pytest.mark.usefixtures("untouched")
def test_the_encoder_is_left_bit_for_bit(encoder: mb.Encoder, edit: Callable[[mb.Encoder], None]) -> None:
    edit(encoder)


def test_only_what_is_not_frozen_is_trained(bert: mb.Encoder) -> None:
    adapter = random_adapter(bert)
    model = classifier(bert, adapter.task, adapter.head)
    placed = attach(model, "lora", adapter.tensors, frozenset({"A"}), adapter.config, generator(0))
    assert placed.keys() == adapter.sites.keys()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(values["B"]) for values in placed.values()}
    for site, values in placed.items():
        assert isinstance(model.encoder.get_submodule(site), AdaptedLinear)
        for name, parameter in values.items():
            assert torch.equal(parameter, adapter.tensors[site][name])
            assert parameter.data_ptr() != adapter.tensors[site][name].data_ptr()


def test_casting_keeps_what_is_trained(bert: mb.Encoder) -> None:
    adapter = random_adapter(bert)
    model = classifier(bert, adapter.task, adapter.head)
    attach(model, "lora", adapter.tensors, frozenset({"A"}), adapter.config, generator(0))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cast_frozen(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in before else torch.bfloat16)
        assert name not in before or parameter is before[name]


LAYER = "encoder.layer.{}."
BERT_BIASES = [
    f"{LAYER}{name}.bias"
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
BERT_NORMS = [
    f"{LAYER}{place}.LayerNorm.{part}" for place in ("attention.output", "output") for part in ("weight", "bias")
]


def test_the_names_of_biases_and_norms(bert: mb.Encoder) -> None:
    biases = {name.format(layer) for name in BERT_BIASES for layer in (0, 1)} | {"pooler.dense.bias"}
    norms = {name.format(layer) for name in BERT_NORMS for layer in (0, 1)}
    norms |= {"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"}
    assert set(shift_names(bert.model, bias=True, layernorm=False)) == biases
    assert set(shift_names(bert.model, bias=False, layernorm=True)) == norms
    assert set(shift_names(bert.model, bias=True, layernorm=True)) == biases | norms
    assert shift_names(bert.model, bias=False, layernorm=False) == []


BIASES_AND_NORMS = {
    "bert": (13, 10),
    "minilm": (13, 10),
    "roberta": (12, 10),
    "xlm-roberta": (12, 10),
    "camembert": (12, 10),
    "distilbert": (12, 10),
    "electra": (13, 10),
    "deberta-v2": (16, 10),
    "modernbert": (0, 5),
}


def test_every_architecture_has_its_biases_and_norms(encoders: dict[str, mb.Encoder]) -> None:
    found = {}
    for architecture, encoder in encoders.items():
        biases = shift_names(encoder.model, bias=True, layernorm=False)
        norms = shift_names(encoder.model, bias=False, layernorm=True)
        assert len({*biases, *norms}) == len(biases) + len(norms)
        assert {*biases, *norms} <= {name for name, _ in encoder.model.named_parameters()}
        found[architecture] = len(biases), len(norms)
    assert found == BIASES_AND_NORMS


def dropped(seed: int, p: float = 0.3, shape: tuple[int, ...] = (200, 50)) -> Tensor:
    layer = SeededDropout(p, generator(seed)).train()
    return torch.stack([layer(torch.ones(shape)) for _ in range(2)])


def test_dropout_repeats_by_its_seed_and_not_by_torch_s() -> None:
    torch.manual_seed(1)
    one = dropped(5)
    torch.manual_seed(2)
    assert torch.equal(dropped(5), one)
    assert not torch.equal(dropped(6), one)
    assert not torch.equal(one[0], one[1])


def test_dropout_takes_nothing_from_torch_s_generator() -> None:
    before = torch.random.get_rng_state()
    dropped(5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    values = dropped(7)
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float((values == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(values.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_dropout_that_is_off_is_the_identity(p: float, training: bool) -> None:
    layer, x = SeededDropout(p, generator(0)).train(training), torch.randn(3, 4, generator=generator(1))
    assert torch.equal(layer(x), x)


def test_only_the_seeded_dropouts_are_switched_on(encoder: mb.Encoder) -> None:
    adapter = random_adapter(encoder, dropout=0.5)
    model = classifier(encoder, adapter.task, adapter.head)
    source = generator(3)
    set_head_dropout(model, 0.4, source)
    attach(model, adapter.type, adapter.tensors, frozenset(), adapter.config, source)
    assert not [m for name, m in model.shell.named_modules() if _is_head_dropout(model, name, m)]
    quiet = outputs(model, encoder)
    np.testing.assert_allclose(quiet, outputs(folded(encoder, adapter), encoder), atol=2e-5 * np.abs(quiet).max())
    dropout_on(model, True)
    on = [module for module in model.modules() if isinstance(module, SeededDropout) and module.training]
    assert len(on) > len(adapter.sites)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    assert np.abs(outputs(model, encoder) - quiet).max() > 0
    dropout_on(model, False)
    assert np.array_equal(outputs(model, encoder), quiet)


def _is_head_dropout(model: Classifier, name: str, module: nn.Module) -> bool:
    return type(module) is nn.Dropout and not name.startswith(f"{model.shell.base_model_prefix}.")
