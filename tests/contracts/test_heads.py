"""Every head: trained, saved, reloaded, merged, predicted alone and in mixed batches, calibrated, written whole."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.composing.calibration import _head, _outputs
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.encoder.classifier import classifier, fresh_classifier, head_shapes
from mergekit_bert.encoder.head import HEADS, Head, head_of
from mergekit_bert.encoder.pooled import PairHead
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError, TrainingError
from mergekit_bert.hardware import generator
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter, same_adapter, same_tensors
from tests.tiny import tiny_rows
from tests.training.runs import train, tune

TEXTS = [("good film", "a bad film"), ("the dog sees a cat and the cat sees a dog", "film"), ("cat", "dog")]


@pytest.fixture(params=HEADS.names())
def head(request: pytest.FixtureRequest) -> Head:
    return HEADS.get(request.param)


def with_head(encoder: mb.Encoder, task: str, head: str, seed: int = 0) -> Adapter:
    """A random adapter under fresh values of a head."""
    adapter = random_adapter(encoder, task, seed=seed, basis="random")
    model = fresh_classifier(encoder, adapter.task, generator(seed, 9), head)
    sites = {site: size for site, size in adapter.sites.items() if HEADS.get(head).reads(site)}
    values = {name: parameter.detach().clone() for name, parameter in model.head().items()}
    tensors = {site: adapter.tensors[site] for site in sites}
    return dataclasses.replace(adapter, sites=sites, tensors=tensors, head=values)


def reference(encoder: mb.Encoder, adapter: Adapter, texts: list[tuple[str, ...]]) -> np.ndarray:
    """Outputs by transformers' own forward pass, row by row, the head worked out by hand."""
    part = adapter.part(adapter.name)
    folded, name = fold(encoder, part), head_of(part.head).name
    found = []
    for row in texts:
        groups = [(text,) for text in row] if HEADS.get(name).apart else [row]
        means = []
        for group in groups:
            with torch.no_grad():
                states = folded.model(**encoder.tokenizer(*group, return_tensors="pt")).last_hidden_state
            means.append(states[0].double().mean(0))
        if HEADS.get(name).apart:
            u, v = means
            features = (u @ v / u.norm() / v.norm())[None]
            features = torch.cat([features, (u - v).abs(), u * v]) if name == "matching" else features
        else:
            features = means[0]
        weight, bias = (part.head[f"{name}.linear.{one}"].double() for one in ("weight", "bias"))
        found.append((weight @ features + bias).numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["mean", "matching", "cosine"])
def test_pooled_heads_are_what_they_say_on_every_architecture(encoder: mb.Encoder, name: str) -> None:
    adapter = with_head(encoder, "para", name)
    outputs = Predictor(adapter, encoder).outputs("para", Rows(tuple(TEXTS), None, "texts"))
    assert outputs == pytest.approx(reference(encoder, adapter, TEXTS), abs=2e-5)


def test_a_head_reads_what_transformers_gives_for_every_text(bert: mb.Encoder, head: Head) -> None:
    """The last states row by row, and the head's own module on their means; the native head on a batch of one."""
    adapter = with_head(bert, "para", head.name)
    part, found = adapter.part("para"), Predictor(adapter, bert).outputs("para", Rows(tuple(TEXTS), None, "texts"))
    model = classifier(fold(bert, part), part.task, part.head)
    for row, outputs in zip(TEXTS, found, strict=True):
        inputs = [
            bert.tokenizer(*texts, return_tensors="pt") for texts in ([(one,) for one in row] if head.apart else [row])
        ]
        with torch.no_grad():
            if head.is_native:
                alone = model(**inputs[0])
            else:
                means = torch.stack([model.encoder(**one)[0].mean(1) for one in inputs], 1)
                alone = model.get_submodule(head.name)(means)
        np.testing.assert_allclose(outputs, alone[0], atol=1e-5)


def test_a_head_is_known_by_its_tensors(bert: mb.Encoder, para: mb.Task, head: Head) -> None:
    assert head_of(head_shapes(bert.config, para, head)) is head


def test_an_adapter_comes_back_as_it_was(bert: mb.Encoder, head: Head, tmp_path: Path) -> None:
    adapter = with_head(bert, "sts", head.name)
    mb.save(adapter, tmp_path / "a.safetensors")
    read = mb.load(tmp_path / "a.safetensors")
    assert isinstance(read, Adapter)
    assert same_adapter(read, adapter)


def test_mixed_batches_answer_as_each_row_alone(bert: mb.Encoder) -> None:
    """Rows under all heads, of one text and of two, together."""
    adapters = {f"{name}": with_head(bert, "para", name, seed) for seed, name in enumerate(HEADS.names())}
    experts = {
        name: dataclasses.replace(one, task=dataclasses.replace(one.task, name=name)) for name, one in adapters.items()
    }
    experts["sst"] = with_head(bert, "sst", "mean", 7)
    model = mb.merge(list(experts.values()), "ensemble")
    predictor = Predictor(model, bert)
    requests = [(name, texts) for texts in TEXTS for name in adapters] + [("sst", ("good film",)), ("sst", ("a cat",))]
    together = predictor.mixed(requests)
    for (name, texts), answer in zip(requests, together, strict=True):
        alone = Predictor(experts[name], bert).predict(name, [texts])[0]
        assert answer.label == alone.label
        assert answer.outputs == pytest.approx(alone.outputs, abs=1e-5)


def test_a_merge_keeps_each_tasks_head_and_every_export_answers_alike(
    bert: mb.Encoder, head: Head, tmp_path: Path
) -> None:
    adapters = [with_head(bert, task, head.name, seed) for seed, task in enumerate(("para", "sts"))]
    merged = mb.merge(adapters, "task_arithmetic", weights={"para": 0.5, "sts": 0.5})
    assert isinstance(merged, mb.Merged)
    assert all(same_tensors(merged.own[one.name].head, one.head) for one in adapters)
    mb.save(merged, tmp_path / "m.safetensors")
    expected = Predictor(merged, bert)
    read = mb.predictor(tmp_path / "m.safetensors", base=bert)
    mb.export(merged, tmp_path / "dense", base=bert)
    again = mb.merge([tmp_path / "dense" / one.name for one in adapters], "fedavg", base=bert)
    assert isinstance(again, mb.Merged)
    for one in adapters:
        assert all(torch.allclose(again.own[one.name].head[name], value) for name, value in one.head.items())
        answers = expected.outputs(one.name, Rows(tuple(TEXTS), None, "texts"))
        whole = mb.predictor(tmp_path / "dense" / one.name)
        for predictor, allowed in ((read, 1e-5), (whole, 1e-4)):
            found = np.array([answer.outputs for answer in predictor.predict(one.name, TEXTS)])
            assert found == pytest.approx(answers, abs=allowed)


def test_stored_features_give_what_the_whole_model_gives(bert: mb.Encoder, head: Head) -> None:
    adapter = with_head(bert, "para", head.name)
    rows, part = tiny_rows(adapter.task, 9), adapter.part("para")
    stored = _head(fold(bert, part), part, rows)
    outputs = _outputs(stored, {name: value.double() for name, value in part.head.items()})
    assert outputs.numpy() == pytest.approx(Predictor(adapter, bert).outputs("para", rows), abs=1e-5)


def test_training_lowers_the_loss_and_touches_no_pooler_that_is_not_read(
    bert: mb.Encoder, head: Head, tmp_path: Path
) -> None:
    task = mb.get_task("para")
    adapter = train(bert, tmp_path / "a.safetensors", "para", head=head.name)
    assert head_of(adapter.head) is head
    assert all(head.reads(site) for site in adapter.sites)
    fresh = fresh_classifier(bert, task, generator(0, 1), head.name).head()
    assert any(not torch.equal(adapter.head[name], value) for name, value in fresh.items())
    assert classifier(bert, task, adapter.head).every_token == head.every_token


@pytest.mark.parametrize("name", ["matching", "cosine"])
def test_a_comparison_wants_two_texts(bert: mb.Encoder, sst: mb.Task, name: str) -> None:
    with pytest.raises(TrainingError, match=rf"`head={name}`: task 'sst' with the text sentence; expected a task"):
        fresh_classifier(bert, sst, generator(0), name)


def test_peft_has_no_place_for_another_head(bert: mb.Encoder, tmp_path: Path) -> None:
    mb.save(with_head(bert, "para", "mean"), tmp_path / "a.safetensors")
    with pytest.raises(CompositionError, match=r"the head mean; expected transformers' own"):
        mb.convert(tmp_path / "a.safetensors", "peft", tmp_path / "p", base=bert)


def test_a_folder_of_a_pooled_head_embeds_by_sentence_transformers_layout(bert: mb.Encoder, tmp_path: Path) -> None:
    """What sentence-transformers reads: the encoder alone, the list of modules, the mean over tokens."""
    from transformers import AutoModel

    adapter = with_head(bert, "sts", "matching")
    mb.export(mb.merge([adapter], "task_arithmetic"), tmp_path / "d", base=bert)
    folder = tmp_path / "d" / "sts"
    modules = json.loads((folder / "modules.json").read_text())
    assert [(one["path"], one["type"].rpartition(".")[2]) for one in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
    ]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    model = AutoModel.from_pretrained(folder)
    part = adapter.part("sts")
    tree = fold(bert, part).model
    inputs = bert.tokenizer("good film", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**inputs)[0], tree(**inputs)[0], atol=1e-6)


def test_full_fine_tuning_under_every_head_scores_as_it_was_trained(
    bert: mb.Encoder, head: Head, tmp_path: Path
) -> None:
    model = tune(bert, tmp_path / "full", "sts", head=head.name, epochs=1)
    score = float(model.record["scores"]["held_out_pearson"])
    rows = tiny_rows(mb.get_task("sts"), 60)
    held = hold_out(rows, 0.2, 1000, 0)[1]
    outputs = mb.predictor(tmp_path / "full").predict("sts", held.texts)
    assert held.labels is not None
    found = np.corrcoef([one.outputs[0] for one in outputs], held.labels)[0, 1]
    assert found == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2"])
def test_statistics_are_those_of_every_text_alone(encoders: dict[str, mb.Encoder], architecture: str) -> None:
    """Packed or padded: texts read apart count as sequences, and padding counts for nothing."""
    encoder, rows = encoders[architecture], tiny_rows(mb.get_task("para"), 6)
    part = with_head(encoder, "para", "matching").part("para")
    model = classifier(fold(encoder, part), part.task, part.head)
    weights = {
        name: module.weight.requires_grad_()
        for name, module in model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features <= 32
        if not of_the_head(name) and "pos_" not in name  # DeBERTa's positions are no tokens
    }
    grams = {
        name: torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64) for name, weight in weights.items()
    }
    fishers = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    tokens, seen = 0, dict[str, torch.Tensor]()
    for name in weights:
        hook = partial(lambda site, module, given: seen.setdefault(site, given[0].detach()), name)
        model.encoder.get_submodule(name).register_forward_pre_hook(lambda *given, hook=hook: (hook(*given), None)[1])
    for texts in rows.texts:
        means = []
        for text in texts:
            seen.clear()
            states = model.encoder(**encoder.tokenizer(text, return_tensors="pt"))[0]
            means.append(states.mean(1))
            tokens += states.shape[1]
            for name, x in seen.items():
                grams[name] += (x[0].T @ x[0]).double()
        outputs = model.get_submodule("matching")(torch.stack(means, 1))[0]
        for chance, score in zip(outputs.softmax(0).tolist(), outputs.log_softmax(0), strict=True):
            found = torch.autograd.grad(score, list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, found, strict=True):
                fishers[name] += chance * gradient.double().square() / len(rows)
    gram, fisher = (collect(kind, encoder, [part], [rows]) for kind in ("gram", "fisher"))
    for name in weights:
        exact = grams[name] / tokens
        assert gram[name].count == tokens
        np.testing.assert_allclose(gram[name].dense(), exact, atol=1e-4 * float(exact.abs().max()))
        scale = float(fishers[name].mean())
        np.testing.assert_allclose(fisher[name].left, fishers[name].mean(1), rtol=1e-2, atol=1e-3 * scale)


STARS = mb.Task("stars", "regress", ("a", "b"), ("pearson",), range=(1.0, 5.0))
"""A range that does not begin at 0: a head must take its offset, not its factor alone."""


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_answers_in_the_range_of_its_task(bert: mb.Encoder, head: Head, stream: bool, tmp_path: Path) -> None:
    adapter = dataclasses.replace(with_head(bert, "sts", head.name), task=STARS)
    merged = mb.merge([adapter], "task_arithmetic")
    rows = Rows(tuple(TEXTS), None, "texts")
    expected = mb.predictor(merged, base=bert).outputs("stars", rows)
    (folder,) = mb.export(merged, tmp_path / "d", base=bert, stream=stream)
    assert mb.predictor(folder).outputs("stars", rows) == pytest.approx(expected, abs=2e-4)
    again = mb.merge([folder], "task_arithmetic", base=bert)
    assert mb.predictor(again, base=bert).outputs("stars", rows) == pytest.approx(expected, abs=2e-4)


def test_a_head_without_a_layer_of_outputs_is_scaled_by_who_reads_it(
    bert: mb.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dot product of two projections (Eq. 2 of the seed study): no layer could take the range's offset."""

    class Dot(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(width, 4), torch.nn.Linear(width, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u, v = x.unbind(1)
            return (self.left(u) * self.right(v)).sum(1, keepdim=True)

    class Projected(PairHead):
        name, description, source = "test-projected", "dot product of two projections", "a test"

        def compare(self, config: Any, task: mb.Task) -> torch.nn.Module:
            return Dot(config.hidden_size)

    monkeypatch.setattr(HEADS, "_added", {})
    mb.register(Projected())
    for stream in (False, True):
        test_a_folder_answers_in_the_range_of_its_task(bert, Projected(), stream, tmp_path / str(stream))
    rows = [("a good film", "a film", 4.0), ("a cat", "bad", 2.0)] * 20
    model = mb.finetune(
        STARS, rows, tmp_path / "full", base=bert, head="test-projected", epochs=1, max_length=40, precision="fp32"
    )
    outputs = [answer.outputs[0] for answer in mb.predictor(model).predict("stars", [row[:2] for row in rows[:2]])]
    assert all(-20 < output < 30 for output in outputs)
