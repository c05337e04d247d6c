"""Packed = padded = a row at a time: outputs and gradients, for every architecture and whatever is trained."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, attach_extras, cast_frozen, unfreeze
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.errors import EncoderError
from mergekit_bert.hardware import autocast, generator
from tests.adapters.helpers import random_adapter
from tests.tiny import ARCHITECTURES, WORDS

TRAINED = (*FAMILIES.names(), "full")
PADDED_ONLY = ("deberta-v2",)


@pytest.fixture(params=ARCHITECTURES)
def encoder(request: pytest.FixtureRequest, encoders: dict[str, mb.Encoder]) -> mb.Encoder:
    """Every architecture in turn."""
    return encoders[request.param]


def rows_of(lengths: list[int]) -> Rows:
    return Rows(tuple((" ".join(WORDS[(n + i) % len(WORDS)] for i in range(n)), "film") for n in lengths), None, "rows")


def tokens_of(encoder: mb.Encoder, lengths: list[int], kind: str = "full") -> Tokens:
    return adapter_of(encoder, kind).part("para").tokens(encoder, rows_of(lengths))


def adapter_of(encoder: mb.Encoder, kind: str) -> Adapter:
    return random_adapter(encoder, "para", kind="lora" if kind == "full" else kind, spread=0.2, length=3)


def trainable(encoder: mb.Encoder, kind: str) -> Classifier:
    """A model with random values in all that is trained, so that no gradient is zero by chance."""
    one = adapter_of(encoder, kind)
    model = classifier(encoder, one.task, one.head)
    if kind == "full":
        unfreeze(model.encoder, [name for name, _ in model.encoder.named_parameters()])
    else:
        attach(model, kind, one.tensors, frozenset(), one.config, generator(0))
    for values in attach_extras(model.encoder, one.extras).values():
        for parameter in values.values():
            parameter.requires_grad_(True)
    for name, parameter in model.head().items():
        parameter.data = torch.randn(parameter.shape, generator=generator(len(name)))
        parameter.requires_grad_(True)
    return model


def padded(model: Classifier, batch: Batch) -> Tensor:
    return model(**batch.padded())


Way = Callable[[Classifier, Tokens], Tensor]
WAYS: dict[str, Way] = {
    "packed": lambda model, tokens: outputs_of(model, tokens.batch(list(range(len(tokens))))),
    "padded": lambda model, tokens: padded(model, tokens.batch(list(range(len(tokens))))),
    "alone": lambda model, tokens: torch.cat([padded(model, tokens.batch([row])) for row in range(len(tokens))]),
}


def found(model: Classifier, tokens: Tokens, way: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of a sum of them in which every row has a weight of its own."""
    model.zero_grad()
    outputs = WAYS[way](model, tokens).float()
    (outputs * torch.linspace(-1, 2, outputs.numel()).view(outputs.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.detach(), grads


def worst(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, in units of the largest value of its kind."""
    assert one.keys() == two.keys()
    scale = max(float(value.abs().max()) for value in two.values())
    return max(float((one[name] - two[name]).abs().max()) for name in one) / scale


def test_every_architecture_but_those_known_is_packed(encoders: dict[str, mb.Encoder]) -> None:
    assert [name for name, one in encoders.items() if not packing.enabled(one.model)] == list(PADDED_ONLY)


def skip_without_a_place(encoder: mb.Encoder, kind: str) -> None:
    """A prefix needs an architecture that is packed."""
    try:
        adapter_of(encoder, kind)
    except EncoderError:
        assert encoder.config.model_type in PADDED_ONLY
        pytest.skip("no place for it")


@pytest.mark.parametrize("kind", TRAINED)
def test_packed_is_padded_is_a_row_at_a_time(encoder: mb.Encoder, kind: str) -> None:
    skip_without_a_place(encoder, kind)
    model = trainable(encoder, kind)
    tokens = tokens_of(encoder, [3, 20, 1, 9, 9, 2, 15, 14, 30, 3], kind)
    outputs, grads = found(model, tokens, "packed")
    assert outputs.std() > 1e-2
    for way in ("padded", "alone"):
        others, wanted = found(model, tokens, way)
        torch.testing.assert_close(outputs, others, rtol=1e-5, atol=1e-5)
        assert worst(grads, wanted) < 1e-5, way
    assert len(grads) > (len(model.head()) if kind == "full" or FAMILIES.get(kind).sites else 0)


@pytest.mark.parametrize("kind", TRAINED)
def test_in_half_precision_they_agree_to_its_rounding(encoder: mb.Encoder, kind: str) -> None:
    skip_without_a_place(encoder, kind)
    model = trainable(encoder, kind)
    tokens = tokens_of(encoder, [3, 20, 1, 9, 9, 2, 15], kind)
    exact, wanted = found(model, tokens, "alone")
    cast_frozen(model, torch.bfloat16)
    with autocast(torch.bfloat16, torch.device("cpu")):
        outputs, grads = found(model, tokens, "packed")
    assert float((outputs - exact).abs().max()) < 0.03 * float(exact.abs().max())
    apart = torch.cat([(grads[name] - wanted[name]).flatten() for name in wanted])
    assert apart.norm() < 0.05 * torch.cat([value.flatten() for value in wanted.values()]).norm()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_whatever_the_lengths(bert: mb.Encoder, lengths: list[int]) -> None:
    model = trainable(bert, "lora")
    tokens = tokens_of(bert, lengths)
    (outputs, grads), (others, wanted) = (found(model, tokens, way) for way in ("packed", "alone"))
    torch.testing.assert_close(outputs, others, rtol=1e-5, atol=1e-5)
    assert worst(grads, wanted) < 1e-5


def test_a_window_shorter_than_the_row_is_kept(encoders: dict[str, mb.Encoder]) -> None:
    """ModernBERT's local layers see 4 tokens to each side."""
    encoder = encoders["modernbert"]
    assert encoder.config.sliding_window < 30
    assert "sliding_attention" in encoder.config.layer_types
    model = trainable(encoder, "lora")
    tokens = tokens_of(encoder, [30, 30])
    (outputs, _), (others, _) = (found(model, tokens, way) for way in ("packed", "padded"))
    torch.testing.assert_close(outputs, others, rtol=1e-5, atol=1e-5)


def test_a_padding_token_inside_a_row_is_counted_as_the_architecture_does(encoder: mb.Encoder) -> None:
    model = trainable(encoder, "lora")
    tokens = tokens_of(encoder, [4, 6, 5])
    for ids in tokens.columns["input_ids"]:
        ids[2] = encoder.pad_token
    with torch.no_grad():
        torch.testing.assert_close(WAYS["packed"](model, tokens), WAYS["alone"](model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", [{"is_decoder": True}, {"chunk_size_feed_forward": 1}, {"model_type": "mobilebert"}])
def test_what_cannot_be_packed_is_padded(bert: mb.Encoder, odd: dict[str, object]) -> None:
    model = AutoModel.from_config(copy.deepcopy(bert.config), attn_implementation="eager")
    for name, value in odd.items():
        setattr(model.config, name, value)
    packing.enable(model)
    assert not packing.enabled(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_row_sees_its_neighbours(encoder: mb.Encoder) -> None:
    model = trainable(encoder, "lora")
    one = tokens_of(encoder, [5, 7, 9])
    two = tokens_of(encoder, [25, 7, 1])
    with torch.no_grad():
        torch.testing.assert_close(WAYS["packed"](model, one)[1], WAYS["packed"](model, two)[1], rtol=1e-5, atol=1e-5)
