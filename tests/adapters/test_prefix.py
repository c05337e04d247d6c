"""Prefixes, against each row alone in float64 with keys and values put in front by hand, and against PEFT."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForSequenceClassification
from transformers.masking_utils import eager_mask

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach_extras, fold
from mergekit_bert.adapters.families.prefix import PREFIX
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import Part, Patch, check_part
from mergekit_bert.data.batches import Tokens
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier, share
from mergekit_bert.encoder.forward import encode, outputs_of
from mergekit_bert.errors import EncoderError, ModelFileError, TrainingError
from mergekit_bert.hardware import generator
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import random_adapter
from tests.tiny import tiny_rows

FIRST_POSITION = {"bert": 0, "roberta": 1, "distilbert": 0, "electra": 0}
"""Of the architectures that learn an embedding of each position; the tiny models' padding is token 0."""
PACKED = (*FIRST_POSITION, "modernbert")
IN_PEFT = ("bert", "roberta", "electra")
"""The architectures to whose layers PEFT can hand keys and values; transformers' others take no cache."""


def by_hand(encoder: mb.Encoder, prefix: dict[str, Tensor], ids: dict[str, Tensor]) -> Tensor:
    """The last states of one row, by transformers' own model in float64 and an attention written here."""
    model, calls = copy.deepcopy(encoder.model).double(), iter(range(100))
    width = encoder.config.hidden_size // encoder.config.num_attention_heads

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        layer = next(calls)
        ahead = [prefix[name][layer].view(-1, query.shape[1], width).transpose(0, 1)[None] for name in ("key", "value")]
        key, value = torch.cat([ahead[0], key], 2), torch.cat([ahead[1], value], 2)
        scores = query @ key.transpose(2, 3) / width**0.5
        if mask is not None:
            scores[..., ahead[0].shape[2] :] += mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "by_hand"
    if (first := FIRST_POSITION.get(encoder.config.model_type)) is not None:
        length = prefix["key"].shape[1]
        ids = {**ids, "position_ids": first + length + torch.arange(ids["input_ids"].shape[1])[None]}
    states: Tensor = model(**ids)[0]
    return states


def adapter_of(encoder: mb.Encoder, length: int = 5, **options: Any) -> Adapter:
    return random_adapter(encoder, "para", kind="prefix", length=length, **options)


def tokens_of(adapter: Adapter, encoder: mb.Encoder, count: int = 6) -> Tokens:
    return adapter.part("para").tokens(encoder, tiny_rows(mb.get_task("para"), count))


def one_row(tokens: Tokens, row: int) -> dict[str, Tensor]:
    return {name: torch.tensor(column[row])[None] for name, column in tokens.columns.items()}


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_is_each_row_alone_with_the_prefix_in_front(encoders: dict[str, mb.Encoder], architecture: str) -> None:
    encoder = encoders[architecture]
    adapter = adapter_of(encoder)
    tokens, tree = tokens_of(adapter, encoder), share(encoder.model)
    placed = attach_extras(tree, adapter.extras)["prefix"]
    for parameter in placed.values():
        parameter.requires_grad_(True)
    packed = encode(tree, tokens.batch(list(range(len(tokens)))))[0][:, 0]
    prefix = {name: value.detach().double().requires_grad_() for name, value in placed.items()}
    alone = torch.cat([by_hand(encoder, prefix, one_row(tokens, row))[:, 0] for row in range(len(tokens))])
    torch.testing.assert_close(packed.double(), alone, rtol=1e-5, atol=1e-5)
    scale = torch.randn(alone.shape, generator=generator(4))
    (packed * scale).sum().backward()
    (alone * scale).sum().backward()
    for name, parameter in placed.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), prefix[name].grad, rtol=1e-3, atol=1e-4)
        assert (prefix[name].grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("architecture", IN_PEFT)
def test_its_forward_is_that_of_peft(
    encoders: dict[str, mb.Encoder], tiny_folders: dict[str, Path], architecture: str, projection: bool, para: Task
) -> None:
    encoder = encoders[architecture]
    torch.manual_seed(3)
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_folders[architecture], num_labels=2)
    config = PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=32
    )
    model = get_peft_model(theirs, config).eval()
    layers = model.get_prompt_embedding_to_save("default").view(5, -1, 2, encoder.config.hidden_size)
    key, value = layers.permute(2, 1, 0, 3)
    head = {name: theirs.get_parameter(_in_peft(name, theirs)).detach() for name in _head_names(encoder)}
    part = Part(para, 38, {}, {}, head, {"prefix": {"key": key.contiguous(), "value": value.contiguous()}})
    rows = tiny_rows(para, 6)
    given = encoder.tokenizer(*map(list, zip(*rows.texts, strict=True)), padding=True, return_tensors="pt")
    tokens = part.tokens(encoder, rows)
    with torch.no_grad():
        ours = outputs_of(classifier(fold(encoder, part), para, head), tokens.batch(list(range(6))))
        expected = model(**given).logits
    assert expected.std(0).max() > 1e-5
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def _head_names(encoder: mb.Encoder) -> list[str]:
    return list(random_adapter(encoder, "para", kind="probe").head)


def _in_peft(name: str, model: nn.Module) -> str:
    """PEFT keeps the head's last module twice."""
    module, _, rest = name.partition(".")
    saved = f"{module}.modules_to_save.default.{rest}"
    return saved if saved in dict(model.named_parameters()) else name


def test_what_the_mlp_gives_is_what_is_kept(bert: mb.Encoder) -> None:
    """Trained through the MLP or kept as keys and values, the answers are the same; gradients reach all of it."""
    options = FAMILIES.get("prefix").options(length=4, projection=True)
    trained, size = PREFIX.init(options, bert, generator(0)), PREFIX.size(bert)
    kept = PREFIX.kept(size, trained)
    assert {name: tuple(value.shape) for name, value in kept.items()} == PREFIX.shapes(options, size)
    states, given = [], bert.tokenizer(["good film", "a cat likes the dog"], padding=True, return_tensors="pt")
    for values in (trained, kept):
        tree = share(bert.model)
        placed = attach_extras(tree, {"prefix": values})["prefix"]
        for parameter in placed.values():
            parameter.requires_grad_(True)
        states.append(tree(**given)[0])
        (states[-1] * torch.randn(states[-1].shape, generator=generator(1))).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in placed.values())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("architecture", PACKED)
def test_it_begins_as_words_of_the_vocabulary(
    encoders: dict[str, mb.Encoder], architecture: str, projection: bool
) -> None:
    """A row behind it has, in its first layer, the keys and values of words that stand before it."""
    encoder, size = encoders[architecture], PREFIX.size(encoders[architecture])
    options = FAMILIES.get("prefix").options(length=4, projection=projection)
    prefix = PREFIX.kept(size, PREFIX.init(options, encoder, generator(5)))
    ids = torch.randint(encoder.words.num_embeddings, (4,), generator=generator(5))
    seen = list[tuple[Tensor, Tensor]]()

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        seen.append((key, value))
        return value.transpose(1, 2), None

    AttentionInterface.register("watch", watch)
    AttentionMaskInterface.register("watch", eager_mask)
    model = copy.deepcopy(encoder.model)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "watch"
    with torch.no_grad():
        model(input_ids=ids[None])
    key, value = (one[0].transpose(0, 1).flatten(1) for one in seen[0])
    torch.testing.assert_close(prefix["value"][0], value, rtol=1e-4, atol=1e-5)
    if architecture != "modernbert":  # which turns keys by their positions
        torch.testing.assert_close(prefix["key"][0], key, rtol=1e-4, atol=1e-5)


def test_an_encoder_with_a_prefix_leaves_the_encoder_as_it_is(bert: mb.Encoder) -> None:
    adapter, given = adapter_of(bert), bert.tokenizer("good film", return_tensors="pt")
    with torch.no_grad():
        before = bert.model(**given)[0]
        assert not torch.allclose(fold(bert, adapter.part("para")).model(**given)[0], before)
        assert torch.equal(bert.model(**given)[0], before)


def test_an_architecture_that_is_padded_has_no_place_for_it(encoders: dict[str, mb.Encoder]) -> None:
    with pytest.raises(EncoderError, match=r"attention of deberta-v2.*for a prefix"):
        PREFIX.size(encoders["deberta-v2"])


@pytest.mark.parametrize(("length", "fits"), [(35, True), (36, False)])
def test_it_must_leave_room_for_text(bert: mb.Encoder, tmp_path: Path, length: int, fits: bool) -> None:
    """A pair takes three marks and a token of each text; the tiny models have 40 positions."""
    adapter = adapter_of(bert, length)
    if fits:
        adapter.answering(bert, "x")
        assert tokens_of(adapter, bert).parts == [(5,)] * 6
        return
    with pytest.raises(ModelFileError, match="36 virtual tokens of at most 40 in a sequence; expected at least 5"):
        adapter.answering(bert, "x")
    options = FAMILIES.get("prefix").options(length=length)
    with pytest.raises(TrainingError, match=r"`length`: 36 virtual tokens of at most 40.*at most 35"):
        train_adapter(bert, mb.get_task("para"), tiny_rows(mb.get_task("para"), 40), tmp_path / "x", "prefix", options)


def test_one_of_another_size_is_refused(encoders: dict[str, mb.Encoder]) -> None:
    adapter = adapter_of(encoders["bert"])
    narrow = {"prefix": {name: value[:, :, :16].clone() for name, value in adapter.extras["prefix"].items()}}
    part = Part(adapter.task, 40, {}, {}, adapter.head, narrow)
    with pytest.raises(ModelFileError, match=r"a prefix of size \(2, 16\); expected \(2, 32\)"):
        check_part("x", part, encoders["bert"])
    assert Patch(extras=adapter.extras).described()["extras"]["prefix.key"]["size"] == [2, 5, 32]
