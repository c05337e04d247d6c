"""Prompts, against embeddings put together by hand in float64, and against PEFT."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import mergekit_bert as mb
from mergekit_bert.adapters.attach import attach_extras, fold
from mergekit_bert.adapters.families.prompt import PROMPT
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import Part
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier, share
from mergekit_bert.encoder.forward import encode, outputs_of, padded_outputs
from mergekit_bert.errors import EncoderError
from mergekit_bert.hardware import generator
from tests.adapters.helpers import random_adapter
from tests.adapters.test_prefix import _head_names, _in_peft, one_row
from tests.tiny import tiny_rows

IN_PEFT = ("bert", "roberta", "deberta-v2", "modernbert")
"""PEFT takes embeddings to be as wide as layers (ELECTRA's are not), and finds no width in DistilBERT's settings."""


@pytest.mark.parametrize("place", ["before", "after"])
def test_every_row_has_the_prompt_around_its_first_token(encoder: mb.Encoder, place: str, para: Task) -> None:
    adapter = random_adapter(encoder, "para", kind="prompt", length=4, place=place)
    rows, tree = tiny_rows(para, 6), share(encoder.model)
    (vectors,) = attach_extras(tree, adapter.extras)["prompt"].values()
    vectors.requires_grad_(True)
    tokens = adapter.part("para").tokens(encoder, rows)
    packed = encode(tree, tokens.batch(list(range(6))))[0][:, 0]
    plain, model = random_adapter(encoder, "para").part("para").tokens(encoder, rows), copy.deepcopy(encoder.model)
    prompt, at = vectors.detach().double().requires_grad_(), 0 if place == "before" else 1
    alone = []
    for row in range(6):
        given = one_row(plain, row)
        words = model.double().get_input_embeddings()(given.pop("input_ids"))
        given = {name: torch.cat([torch.zeros(1, 4, dtype=torch.long), one], 1) for name, one in given.items()}
        states = model(inputs_embeds=torch.cat([words[:, :at], prompt[None], words[:, at:]], 1), **given)[0]
        alone.append(states[:, 0])
    torch.testing.assert_close(packed.double(), torch.cat(alone), rtol=1e-5, atol=1e-5)
    scale = torch.randn(packed.shape, generator=generator(4))
    (packed * scale).sum().backward()
    (torch.cat(alone) * scale).sum().backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad.double(), prompt.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["before", "after"])
def test_packed_is_padded(encoder: mb.Encoder, place: str, para: Task) -> None:
    adapter = random_adapter(encoder, "para", kind="prompt", length=4, place=place)
    part = adapter.part("para")
    tokens, model = part.tokens(encoder, tiny_rows(para, 6)), classifier(fold(encoder, part), para, part.head)
    with torch.no_grad():
        packed = outputs_of(model, tokens.batch(list(range(6))))
    np.testing.assert_allclose(packed, padded_outputs(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", IN_PEFT)
def test_its_forward_is_that_of_peft(
    encoders: dict[str, mb.Encoder], tiny_folders: dict[str, Path], architecture: str, para: Task
) -> None:
    encoder = encoders[architecture]
    torch.manual_seed(3)
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_folders[architecture], num_labels=2)
    model = get_peft_model(theirs, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)).eval()
    vectors = model.get_prompt_embedding_to_save("default")
    head = {name: theirs.get_parameter(_in_peft(name, theirs)).detach() for name in _head_names(encoder)}
    part = Part(para, 38, {}, {}, head, {"prompt": {"before": vectors}})
    rows = tiny_rows(para, 6)
    given = encoder.tokenizer(*map(list, zip(*rows.texts, strict=True)), padding=True, return_tensors="pt")
    tokens = part.tokens(encoder, rows)
    with torch.no_grad():
        ours = outputs_of(classifier(fold(encoder, part), para, head), tokens.batch(list(range(6))))
        expected = model(**given).logits
    assert expected.std(0).max() > 1e-5
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_every_sequence_of_a_row_has_it(bert: mb.Encoder, para: Task) -> None:
    adapter = random_adapter(bert, "para", kind="prompt", length=2)
    part = Part(para, 40, {}, {}, {"matching.linear.weight": torch.zeros(2, 65)}, adapter.extras)
    tokens, first = part.tokens(bert, tiny_rows(para, 3)), bert.words.num_embeddings
    for ids, (one, two) in zip(tokens.columns["input_ids"], tokens.parts, strict=True):
        assert len(ids) == one + two
        for sequence in (ids[:one], ids[one:]):
            assert sequence[:3] == [1, first, first + 1]
            assert max(sequence[3:]) < first


def test_an_encoder_without_the_prompt_refuses_its_tokens(bert: mb.Encoder, para: Task) -> None:
    part = random_adapter(bert, "para", kind="prompt", length=2).part("para")
    tokens = part.tokens(bert, tiny_rows(para, 3))
    with pytest.raises(EncoderError, match="in input_ids"):
        outputs_of(classifier(bert, para, part.head), tokens.batch([0]))


def test_it_begins_as_words_of_the_vocabulary(bert: mb.Encoder) -> None:
    options = FAMILIES.get("prompt").options(length=9)
    vectors: Tensor = PROMPT.init(options, bert, generator(0))["after"]
    assert all((bert.words.weight == vector).all(1).any() for vector in vectors)
    assert len(vectors.unique(dim=0)) > 1
