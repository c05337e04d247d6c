"""Distillation: no steps are the start, one task reaches its expert, no label is read, a killed run goes on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import compress
from mergekit_bert.composing import learning
from mergekit_bert.composing.learning import expert_answers
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.composing.methods import distill
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.errors import CompositionError
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.training.checkpoint import CHECKPOINT
from tests.composing.helpers import merged, trio
from tests.contracts.test_heads import with_head
from tests.tiny import tiny_rows

FP32 = {"precision": "fp32"}


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, basis="random", train_layernorm=True)


def rows_for(encoder: mb.Encoder, count: int = 24, folder: Path | None = None) -> MergeContext:
    def rows(task: str) -> Rows:
        found = tiny_rows(get_task(task), count)
        return dataclasses.replace(found, labels=tuple(float("nan") for _ in found.texts))  # a label read would show

    return MergeContext(lambda: encoder, rows, folder)


def distance(model: mb.Merged, adapters: list[Adapter], encoder: mb.Encoder) -> float:
    """Mean squared distance of outputs from the experts', in units of their variance."""
    found, total = Predictor(model, encoder), 0.0
    for one in adapters:
        rows = dataclasses.replace(tiny_rows(one.task, 24), labels=None)
        truth = Predictor(one, encoder).outputs(one.name, rows)
        total += float(np.square(found.outputs(one.name, rows) - truth).mean() / truth.var())
    return total / len(adapters)


def test_no_steps_are_the_start(bert: mb.Encoder, three: list[Adapter]) -> None:
    for start in ("task_arithmetic", "tsv"):
        none = merged(three, "distill", options={"steps": 0, "start": start}, given=rows_for(bert))
        plain = merged(three, start, {one.name: 0.5 for one in three})
        for site, delta in none.deltas.items():
            np.testing.assert_allclose(delta.dense(), plain.deltas[site].dense(), atol=2e-5)
        small = merged(three, "distill", options={"steps": 0, "start": start}, rank=4, given=rows_for(bert))
        for site, delta in small.deltas.items():
            best = compress(plain.deltas[site], 4)[0].dense()
            np.testing.assert_allclose(delta.dense(), best, atol=2e-5)


def test_it_comes_nearer_to_all_experts_at_either_rank(bert: mb.Encoder, three: list[Adapter]) -> None:
    before = distance(merged(three, "task_arithmetic", {one.name: 0.5 for one in three}), three, bert)
    for rank in (None, 3):
        options = {"steps": 60, "batch_size": 8, "lr": 0.02, **FP32}
        model = merged(three, "distill", options=options, rank=rank, given=rows_for(bert))
        assert distance(model, three, bert) < 0.5 * before
        assert model.trace["learned"]["last_loss"] < 0.5 * model.trace["learned"]["first_loss"]
        assert all(delta.rank <= (rank or 9) for delta in model.deltas.values() if delta.rank is not None)


def test_one_task_reaches_its_expert(bert: mb.Encoder, three: list[Adapter]) -> None:
    """From half of its Delta, which is far away; its norms are not learned, so that states in between stay apart."""
    options = {"steps": 150, "batch_size": 12, "lr": 0.02, "layers": 0.0, "outputs": 1.0, **FP32}
    start = merged(three[:1], "task_arithmetic", {"sst": 0.5})
    model = merged(three[:1], "distill", {"sst": 0.5}, options=options, given=rows_for(bert))
    assert distance(model, three[:1], bert) < 0.02 * distance(start, three[:1], bert)


def test_the_experts_answers_are_those_of_each_row_alone(bert: mb.Encoder, three: list[Adapter]) -> None:
    part = three[2].part("para")
    rows = dataclasses.replace(tiny_rows(part.task, 9), labels=None)
    tokens = tokenise(rows, part.task, bert.tokenizer, part.max_length, bert.pad_token)
    together = expert_answers(bert, part, tokens)
    np.testing.assert_allclose(together.outputs, Predictor(three[2], bert).outputs("para", rows), atol=1e-5)
    for row in range(9):
        alone = expert_answers(bert, part, tokens.take([row]))
        np.testing.assert_allclose(together.features[row], alone.features[0], atol=1e-5)


@pytest.mark.parametrize("local", [False, True])
def test_states_between_layers_reach_the_experts(encoder: mb.Encoder, local: bool) -> None:
    """On every architecture, packed or padded; nothing but the states in the loss."""
    one = trio(encoder, basis="random")[0]
    only = {"features": 0.0, "outputs": 0.0, "layers": 1.0, "local": local}
    options = {"steps": 60, "batch_size": 12, "lr": 0.02, **only, **FP32}
    model = merged([one], "distill", {"sst": 0.5}, options=options, given=rows_for(encoder))
    learned = model.trace["learned"]
    assert learned["last_loss"] < 0.2 * learned["first_loss"]


def test_local_lets_no_gradient_pass_to_lower_layers(bert: mb.Encoder, three: list[Adapter]) -> None:
    """What the head reads is in the loss alone: then the last layer learns, and no other unless gradients pass."""
    start = merged(three, "distill", options={"steps": 0}, given=rows_for(bert))
    for local in (True, False):
        options = {"steps": 3, "batch_size": 8, "layers": 0.0, "local": local, **FP32}
        model = merged(three, "distill", options=options, given=rows_for(bert))
        moved = {
            site.split(".")[2]
            for site, delta in model.deltas.items()
            if not torch.equal(delta.dense(), start.deltas[site].dense())
        }
        assert moved == ({"1"} if local else {"0", "1"})


def test_kept_answers_are_those_asked_for(
    bert: mb.Encoder, three: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row whose texts are encoded apart too."""
    options = {"steps": 4, "batch_size": 8, **FP32}
    adapters = [with_head(bert, "para", "matching"), three[0]]
    kept = merged(adapters, "distill", options=options, given=rows_for(bert))
    monkeypatch.setattr(distill, "_KEPT_BYTES", 0)
    monkeypatch.setattr(distill._Expert, "keeping", None)
    asked = merged(adapters, "distill", options=options, given=rows_for(bert))
    assert kept.trace["learned"]["last_loss"] == pytest.approx(asked.trace["learned"]["last_loss"], rel=1e-4)
    for site, delta in kept.deltas.items():
        np.testing.assert_allclose(delta.dense(), asked.deltas[site].dense(), atol=2e-4)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 7])
def test_a_killed_run_goes_on_to_the_same_bits(
    bert: mb.Encoder, three: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    options = {"steps": 9, "batch_size": 8, **FP32}
    whole = merged(three, "distill", options=options, given=rows_for(bert))
    monkeypatch.setattr(learning, "_SAVE_SECONDS", -1.0)
    really, count, last = distill._Student.terms, 0, steps * len(three)

    def terms(self: Any, *arguments: Any) -> Any:
        nonlocal count
        if count == last:
            raise KilledError
        count += 1
        return really(self, *arguments)

    monkeypatch.setattr(distill._Student, "terms", terms)
    with pytest.raises(KilledError):
        merged(three, "distill", options=options, given=rows_for(bert, folder=tmp_path))
    assert (tmp_path / CHECKPOINT).exists()
    count, last = 0, -1
    again = merged(three, "distill", options=options, given=rows_for(bert, folder=tmp_path))
    assert count == (9 - steps) * len(three), "the steps that were done are not done again"
    other = merged(three, "distill", options={**options, "lr": 0.5}, given=rows_for(bert, folder=tmp_path / "other"))
    assert not (tmp_path / CHECKPOINT).exists(), "it is not needed any more"
    for site, delta in whole.deltas.items():
        assert torch.equal(again.deltas[site].dense(), delta.dense())
    assert any(not torch.equal(other.deltas[site].dense(), delta.dense()) for site, delta in whole.deltas.items())


def test_a_checkpoint_of_another_run_is_passed_over(
    bert: mb.Encoder, three: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_SAVE_SECONDS", -1.0)
    options = {"steps": 3, "batch_size": 8, **FP32}
    with monkeypatch.context() as patch:
        patch.setattr(learning, "remove", lambda path: None)
        merged(three, "distill", options={**options, "lr": 0.1}, given=rows_for(bert, folder=tmp_path))
    assert (tmp_path / CHECKPOINT).exists()
    found = merged(three, "distill", options=options, given=rows_for(bert, folder=tmp_path))
    whole = merged(three, "distill", options=options, given=rows_for(bert))
    for site, delta in whole.deltas.items():
        assert torch.equal(found.deltas[site].dense(), delta.dense())


def test_a_loss_that_is_not_finite_is_told(bert: mb.Encoder, three: list[Adapter]) -> None:
    with pytest.raises(CompositionError, match=r"distill: a loss or weights that are not finite.*`options` lr"):
        merged(three, "distill", options={"steps": 20, "lr": 1e9, **FP32}, given=rows_for(bert))
