"""AdaMerging: what is learned is what is merged, labels count for nothing, and mismatched adapters do worse."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing.merge_input import of_adapter
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.composing.weighting import Blend, layer_of
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.errors import CompositionError
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import dense64, random_adapter, renamed
from tests.composing.helpers import brute_force, given, merged, trio, zeroed
from tests.tiny import tiny_rows

ROWS = 12
QUICK = {"steps": 4, "lr": 0.1, "batch_size": 6}


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, train_bias=True, train_layernorm=True)


def learn(
    encoder: mb.Encoder, adapters: Sequence[Adapter], weights: dict[str, float] | None = None, **options: object
) -> mb.Merged:
    return merged(adapters, "adamerging", weights, given=given(encoder, ROWS), options={**QUICK, **options})


def outputs(model: mb.Merged | Adapter, encoder: mb.Encoder, task: str, name: str | None = None) -> np.ndarray:
    """What a model answers, on the rows of ``task``, by the ordinary way of predicting."""
    return Predictor(model, encoder).outputs(name or task, tiny_rows(get_task(task), ROWS)).astype(np.float64)


def losses(model: mb.Merged, encoder: mb.Encoder, experts: Sequence[Adapter]) -> dict[str, float]:
    """The loss of every task over all rows, by numpy."""
    found = {}
    for expert in experts:
        values = outputs(model, encoder, expert.name)
        if expert.task.kind == "classify":
            chances = np.exp(values) / np.exp(values).sum(1, keepdims=True)
            found[expert.name] = float(-(chances * np.log(chances)).sum(1).mean())
        else:
            truth = outputs(expert, encoder, expert.name)
            found[expert.name] = float(((values - truth) ** 2).mean() / truth.var())
    return found


def learned_layers(model: mb.Merged) -> dict[str, Mapping[str, float]]:
    return {pattern.replace(r"\.", "."): weights for pattern, weights in model.trace["layers"].items()}


def test_the_loss_falls(bert: mb.Encoder, three: list[Adapter]) -> None:
    before, after = (losses(learn(bert, three, steps=steps), bert, three) for steps in (0, 20))
    assert sum(after.values()) < 0.9 * sum(before.values())


@pytest.mark.parametrize("layerwise", [True, False])
def test_the_result_is_the_linear_merge_with_what_was_learned(
    bert: mb.Encoder, three: list[Adapter], layerwise: bool
) -> None:
    model = learn(bert, three, layerwise=layerwise)
    layers, deltas = learned_layers(model), {one.name: dense64(one) for one in three}
    assert layers.keys() == model.deltas.keys()
    for site, delta in model.deltas.items():
        exact = sum(weight * deltas[name][site] for name, weight in layers[site].items())
        np.testing.assert_allclose(delta.dense(), exact, atol=1e-5)
    for name, shift in model.shifts.items():
        exact = sum(model.weights[one.name] * one.shifts[name] for one in three)
        np.testing.assert_allclose(shift, exact, atol=1e-6)
    apart = {(layer_of(site), tuple(weights.values())) for site, weights in layers.items()}
    assert len(apart) == (2 if layerwise else len({layer_of(site) for site in layers}))
    for name, weight in model.weights.items():
        by_layer = {layer_of(site): weights[name] for site, weights in layers.items()}
        assert weight == pytest.approx(np.mean(list(by_layer.values())))
        assert (len(set(by_layer.values())) == 2) is layerwise
    if not layerwise:
        exact_sums = brute_force(three, model.weights)
        for site, delta in model.deltas.items():
            np.testing.assert_allclose(delta.dense(), exact_sums[site], atol=1e-5)


def test_what_learns_is_the_model_that_is_merged(encoder: mb.Encoder) -> None:
    adapters = sorted(trio(encoder, train_bias=True, train_layernorm=True), key=lambda one: one.name)
    blend = Blend(encoder, [of_adapter(one) for one in adapters], lambda site: str(layer_of(site)), 0.0)
    with torch.no_grad():
        blend.weights.copy_(torch.linspace(-1.0, 1.5, blend.weights.numel()).view_as(blend.weights))
    found = blend.weights.tolist()
    layers = {
        site.replace(".", r"\."): {one.name: found[place][blend.column[site]] for place, one in enumerate(adapters)}
        for site in blend.sites
    }
    means = dict(zip((one.name for one in adapters), blend.mean().tolist(), strict=True))
    model = merged(adapters, "task_arithmetic", means, layers=layers)
    for one in adapters:
        rows = tiny_rows(one.task, 7)
        tokens = tokenise(rows, one.task, encoder.tokenizer, one.max_length, encoder.pad_token)
        answers = outputs_of(blend.model(one.part(one.name), model.own[one.name]), tokens.batch(list(range(7))))
        low, high = one.task.range or (0.0, 1.0)
        expected = Predictor(model, encoder).outputs(one.name, rows)
        np.testing.assert_allclose(low + (high - low) * answers.detach(), expected, atol=2e-4)


def test_one_regression_finds_its_expert(bert: mb.Encoder) -> None:
    """Its distance to the expert is zero at a weight of 1 alone."""
    one = random_adapter(bert, "sts", targets="qv", spread=0.15)
    model = learn(bert, [one], steps=60, layerwise=False)
    assert model.weights["sts"] == pytest.approx(1.0, abs=0.03)


def test_mismatched_adapters_do_worse(bert: mb.Encoder) -> None:
    """Two experts whose Deltas were swapped under their heads: what is learned is far from the true experts."""
    sts = random_adapter(bert, "sts", seed=1, targets="qv", spread=0.15)
    other = renamed(random_adapter(bert, "sts", seed=2, start=3, targets="qv", spread=0.15), "other")
    silent = zeroed(other)
    swapped = [dataclasses.replace(sts, tensors=silent.tensors), dataclasses.replace(other, tensors=sts.tensors)]

    def apart(adapters: Sequence[Adapter]) -> float:
        rows = {"sts": tiny_rows(sts.task, ROWS), "other": tiny_rows(sts.task, ROWS, seed=1)}
        lent = MergeContext(lambda: bert, lambda name: dataclasses.replace(rows[name], labels=None))
        model = merged(adapters, "adamerging", given=lent, options={**QUICK, "steps": 30})
        truth, found = outputs(sts, bert, "sts"), outputs(model, bert, "sts")
        return float(((truth - found) ** 2).mean() / truth.var())

    assert apart([sts, silent]) < 0.1 * apart(swapped)


def test_labels_are_never_read(bert: mb.Encoder, three: list[Adapter]) -> None:
    def with_labels(change: float | None) -> mb.Merged:
        def rows(name: str) -> Rows:
            found = tiny_rows(get_task(name), ROWS)
            return dataclasses.replace(found, labels=None if change is None else (change,) * ROWS)

        return merged(three, "adamerging", given=MergeContext(lambda: bert, rows), options=QUICK)

    without = with_labels(None)
    poisoned = with_labels(float("nan"))
    assert (poisoned.trace, poisoned.weights) == (without.trace, without.weights)


def test_it_repeats_and_the_seed_counts(bert: mb.Encoder, three: list[Adapter]) -> None:
    first = learn(bert, three)
    torch.manual_seed(7)
    assert learn(bert, three).trace == first.trace
    other = merged(three, "adamerging", given=given(bert, ROWS), options=QUICK, seed=1)
    assert other.trace["layers"] != first.trace["layers"]


def test_the_order_of_the_adapters_changes_no_bit(bert: mb.Encoder, three: list[Adapter]) -> None:
    first = learn(bert, three)
    assert learned_layers(learn(bert, three[::-1])) == learned_layers(first)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_given_weights_scale_what_is_learned(bert: mb.Encoder, three: list[Adapter], factor: float) -> None:
    one, scaled = learn(bert, three), learn(bert, three, {adapter.name: factor for adapter in three})
    for site, delta in one.deltas.items():
        np.testing.assert_allclose(scaled.deltas[site].dense(), factor * delta.dense(), atol=1e-5)
    for name, shift in one.shifts.items():
        np.testing.assert_allclose(scaled.shifts[name], factor * shift, atol=1e-6)


def test_without_a_step_every_weight_is_the_start(bert: mb.Encoder, three: list[Adapter]) -> None:
    model = learn(bert, three, steps=0, start=0.3)
    assert model.weights == {one.name: pytest.approx(0.3) for one in three}
    assert "first_loss" not in model.trace["learned"]
    for site, exact in brute_force(three, dict.fromkeys(("sst", "sts", "para"), 0.3)).items():
        np.testing.assert_allclose(model.deltas[site].dense(), exact, atol=1e-5)


def test_adapters_of_different_sites_are_learned_together(bert: mb.Encoder) -> None:
    adapters = [
        random_adapter(bert, "sst", rank=2, targets="qv"),
        random_adapter(bert, "sts", rank=5, start=2, targets=r".*layer\.0\.output\.dense"),
        random_adapter(bert, "para", kind="probe"),
    ]
    layers = learned_layers(learn(bert, adapters))
    assert layers["encoder.layer.0.output.dense"].keys() == {"sts"}
    assert layers["encoder.layer.1.attention.self.query"].keys() == {"sst"}
    assert all(weight != pytest.approx(0.3, abs=1e-4) for weights in layers.values() for weight in weights.values())


def test_adapters_without_a_delta_learn_nothing(bert: mb.Encoder, three: list[Adapter]) -> None:
    model = learn(bert, [random_adapter(bert, "sst", kind="probe")])
    assert (model.weights, dict(model.deltas)) == ({"sst": pytest.approx(0.3)}, {})
    zero = learn(bert, [zeroed(one) for one in three])
    assert all(float(delta.dense().abs().max()) == 0 for delta in zero.deltas.values())
    assert all(weight == pytest.approx(0.3) for weights in learned_layers(zero).values() for weight in weights.values())


def test_rows_are_needed(three: list[Adapter]) -> None:
    with pytest.raises(CompositionError, match="rows"):
        merged(three, "adamerging")
