"""Calibration: heads that fit the merged features, and merged Deltas of the size that the experts' had."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize

import mergekit_bert as mb
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.patch import Part
from mergekit_bert.composing.calibration import (
    _head,
    _outputs,
    calibrate_heads,
    calibrate_scales,
    choose,
    features_of,
    judged,
    read_steps,
    refit,
)
from mergekit_bert.composing.merge_input import inputs_of
from mergekit_bert.composing.merging import merge_inputs_of
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.load import Encoder, load_encoder
from mergekit_bert.errors import CompositionError, DataError, UnknownNameError
from mergekit_bert.evaluation.evaluate import evaluate_model
from mergekit_bert.hardware import generator
from mergekit_bert.models.composition import Merged
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter, same_tensors
from tests.composing.helpers import ONE, merged, trio
from tests.tiny import tiny_rows, write_tiny

TASKS = ("sst", "sts", "para")


def some_rows(count: int = 40) -> dict[str, Rows]:
    return {name: tiny_rows(get_task(name), count) for name in TASKS}


def figures(model: Merged, encoder: Encoder, rows: Mapping[str, Rows]) -> dict[str, float]:
    """Main figures as an evaluation finds them."""
    predictor = Predictor(model, encoder)
    found = {}
    for task in model.tasks:
        column = kind_of(task).predicted(task, predictor.outputs(task.name, rows[task.name]))
        found[task.name] = metric(task.metric).value(rows[task.name].label_column(task), column)
    return found


def told(model: Merged) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = model.trace["calibrated"]["heads"]["rows"]
    return rows


def by_figures(model: Merged, encoder: Encoder, rows: Mapping[str, Rows], found: Mapping[str, Tensors]) -> list[float]:
    """Of each task, the figure of the model with other heads."""
    own = {name: dataclasses.replace(model.own[name], head=head) for name, head in found.items()}
    return list(figures(dataclasses.replace(model, own=own), encoder, rows).values())


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_before_and_after_are_what_each_fold_gives_a_head_fitted_on_the_others(
    encoders: dict[str, Encoder], architecture: str
) -> None:
    encoder = encoders[architecture]
    model, rows = merged(trio(encoder), "task_arithmetic"), some_rows()
    found = calibrate_heads(model, encoder, rows, strengths=(0.1,))
    order = torch.randperm(40, generator=generator(0, 11)).tolist()
    before, after = [], []
    for fold_number in range(5):
        fold_rows = {name: one.take(order[fold_number::5]) for name, one in rows.items()}
        others = {
            name: one.take([place for place in order if place not in order[fold_number::5]])
            for name, one in rows.items()
        }
        heads = {}
        for name in TASKS:
            task, part = get_task(name), model.part(name)
            tree = fold(encoder, part)
            labels = torch.from_numpy(others[name].label_column(task))
            labels = labels / 5 if task.range else labels.long()
            heads[name] = refit(task, _head(tree, part, others[name]), labels, 0.1)
        before.append(list(figures(model, encoder, fold_rows).values()))
        after.append(by_figures(model, encoder, fold_rows, heads))
    for place, name in enumerate(TASKS):
        one, table = told(found)[name], [[line[place] for line in before], [line[place] for line in after]]
        honest = judged(table)
        taken = bool(choose(table) and choose([table[0], honest]))
        assert one["before"] == pytest.approx(np.mean(table[0]), abs=1e-5)
        assert one["after"] == pytest.approx(np.mean(honest if taken else table[0]), abs=2e-3)
        assert (one["strength"] == 0.1) == taken
        assert taken != same_tensors(found.own[name].head, model.own[name].head)


def taught(encoder: Encoder, model: Merged, count: int, seed: int, noise: float) -> dict[str, Rows]:
    """Rows whose labels another head over the merged features gives, or chance for a share ``noise`` of them."""
    source, found = np.random.default_rng(seed), {}
    for task in model.tasks:
        rows = tiny_rows(task, count, seed)
        head = random_adapter(encoder, task.name, seed=50).head
        own = dataclasses.replace(model.own[task.name], head=head)
        teacher = dataclasses.replace(model, own={**model.own, task.name: own})
        values = Predictor(teacher, encoder).outputs(task.name, rows).astype(np.float64)
        column = kind_of(task).predicted(task, values - values.mean(0))
        if task.range is not None:
            column = 5 * np.clip(0.5 + column / (4 * column.std()), 0, 1)
        by_chance = source.permutation(column)
        labels = np.where(source.random(count) < noise, by_chance, column)
        found[task.name] = dataclasses.replace(rows, labels=tuple(labels.astype(np.float64).tolist()))
    return found


def test_on_fresh_rows_a_refitted_head_helps_where_there_is_something_to_learn(bert: Encoder) -> None:
    model = merged(trio(bert), "task_arithmetic")
    found = calibrate_heads(model, bert, taught(bert, model, 100, 1, 0.2))
    fresh = taught(bert, model, 300, 2, 0.0)
    before, after = figures(model, bert, fresh), figures(found, bert, fresh)
    assert any(one["strength"] is not None for one in told(found).values())
    for name, one in told(found).items():
        assert after[name] >= before[name] + (0.05 if one["strength"] else 0)


def test_labels_by_chance_leave_the_heads_as_they_are(bert: Encoder) -> None:
    """All but a few: a gain is larger than its standard error by chance in about a sixth of all cases."""
    model = merged(trio(bert), "task_arithmetic")
    changed, best = 0, 0
    for seed in range(3):
        source, rows = np.random.default_rng(seed), some_rows(60)
        for name, one in rows.items():
            labels = source.uniform(0, 5, 60) if name == "sts" else source.integers(0, len(get_task(name).labels), 60)
            rows[name] = dataclasses.replace(one, labels=tuple(labels.astype(np.float64).tolist()))
        found = calibrate_heads(model, bert, rows)
        changed += sum(one["strength"] is not None for one in told(found).values())
        for name, one in told(found).items():
            assert (one["strength"] is None) == same_tensors(found.own[name].head, model.own[name].head)
            assert one["strength"] is not None or one["after"] == one["before"]
        best += len(told(found))
    assert changed <= best / 4


def test_a_choice_is_judged_where_it_was_not_made() -> None:
    old, lucky, better = [0.5] * 5, [0.5, 0.5, 0.5, 0.5, 1.0], [0.6, 0.7, 0.6, 0.7, 0.6]
    assert judged([old, lucky]) == old, "without the one fold there is nothing for it"
    assert judged([old, better]) == better


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], 0),
        ([[0.5, 0.5, 0.5], [0.6, 0.6, 0.6]], 1),
        ([[0.5, 0.5, 0.5], [0.6, 0.4, 0.6]], 0),  # + 0.033, a standard error of 0.067
        ([[0.5, 0.5, 0.5], [0.4, 0.4, 0.4]], 0),
        ([[0.1, 0.1, 0.1], [0.5, 0.6, 0.5], [0.5, 0.5, 0.7]], 1),  # the more cautious of two that are as good
        ([[0.5, 0.1, 0.9], [0.6, 0.2, 1.0]], 1),  # folds differ, and the gain does not
    ],
)
def test_the_most_cautious_within_one_standard_error_is_chosen(table: list[list[float]], expected: int) -> None:
    assert choose(table) == expected


def check_stored_features(encoder: Encoder) -> None:
    """Features computed before, under a bare head, give what the whole model gives."""
    adapter = random_adapter(encoder, "sst")
    rows = tiny_rows(adapter.task, 12)
    model = merged([adapter], "task_arithmetic")
    part = model.part("sst")
    tree = fold(encoder, part)
    head = _head(tree, part, rows)
    outputs = _outputs(head, {name: value.double() for name, value in part.head.items()})
    whole = Predictor(model, encoder).outputs("sst", rows)
    assert outputs.numpy() == pytest.approx(whole, abs=1e-5)


def test_stored_features_give_what_the_whole_model_gives(encoder: Encoder) -> None:
    check_stored_features(encoder)


def test_a_head_that_reads_the_mean_of_all_tokens_gets_it(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "mean", "modernbert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classifier_pooling": "mean"}))
    encoder = load_encoder(folder)
    assert encoder.config.classifier_pooling == "mean"
    check_stored_features(encoder)


def test_bert_gives_its_head_what_the_pooler_made(bert: Encoder, sst: mb.Task) -> None:
    tokens = tokenise(tiny_rows(sst, 5), sst, bert.tokenizer, 40, bert.pad_token)
    found = features_of(bert, tokens, every_token=False)
    pooler = bert.model.get_submodule("pooler.dense")
    assert found.pooled is not None
    assert torch.allclose(found.pooled, torch.tanh(pooler(found.hidden[:, 0].float())).double(), atol=1e-6)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_refitted_regression_head_is_the_ridge_solution(bert: Encoder, sts: mb.Task, strength: float) -> None:
    """BERT's head is one linear layer: ``min mean (x w + b − y)² + s ‖θ − θ₀‖²`` has a closed form."""
    adapter, rows = random_adapter(bert, "sts"), tiny_rows(sts, 50)
    head = _head(bert, Part(sts, 40, {}, {}, adapter.head), rows)
    labels = torch.tensor(rows.labels, dtype=torch.float64) / 5
    found = refit(sts, head, labels, strength)
    pooled = head.encoder.features.pooled  # type: ignore[union-attr]
    x = torch.cat([pooled, torch.ones(len(pooled), 1)], 1).double().numpy()  # type: ignore[arg-type]
    old = np.append(
        adapter.head["classifier.weight"].double().numpy(), adapter.head["classifier.bias"].double().numpy()
    )
    system = x.T @ x / len(x) + strength * np.eye(x.shape[1])
    expected = old + np.linalg.solve(system, x.T @ (labels.numpy() - x @ old) / len(x))
    assert np.append(found["classifier.weight"].numpy(), found["classifier.bias"].numpy()) == pytest.approx(
        expected, abs=1e-5
    )


def test_a_refitted_classification_head_is_the_regularised_maximum(bert: Encoder, para: mb.Task) -> None:
    adapter, rows = random_adapter(bert, "para"), tiny_rows(para, 40)
    head = _head(bert, Part(para, 40, {}, {}, adapter.head), rows)
    labels = torch.tensor(rows.labels).long()
    found = refit(para, head, labels, 0.1)
    x = head.encoder.features.pooled.numpy()  # type: ignore[union-attr]
    old = np.concatenate(
        [adapter.head[name].double().numpy().ravel() for name in ("classifier.weight", "classifier.bias")]
    )

    def value(theta: np.ndarray) -> float:
        logits = x @ theta[: 2 * x.shape[1]].reshape(2, -1).T + theta[2 * x.shape[1] :]
        chances = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return float(-chances[np.arange(len(x)), labels].mean() + 0.1 * ((theta - old) ** 2).sum())

    expected = optimize.minimize(value, old, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-14}).x
    mine = np.concatenate([found[name].numpy().ravel() for name in ("classifier.weight", "classifier.bias")])
    assert mine == pytest.approx(expected, abs=1e-3)


def test_an_infinite_strength_leaves_the_head_as_it_is(encoder: Encoder) -> None:
    model, task = merged(trio(encoder), "task_arithmetic"), get_task("sst")
    rows = tiny_rows(task, 20)
    head = _head(encoder, Part(task, 40, {}, {}, model.own["sst"].head), rows)
    assert same_tensors(refit(task, head, torch.tensor(rows.labels).long(), math.inf), model.own["sst"].head)
    found = calibrate_heads(model, encoder, some_rows(), strengths=(math.inf,))
    assert all(same_tensors(found.own[name].head, model.own[name].head) for name in TASKS)
    assert all(one["strength"] is None for one in told(found).values())


def test_labels_matter_and_nothing_else_of_the_model_changes(bert: Encoder) -> None:
    model, rows = merged(trio(bert), "task_arithmetic"), some_rows(60)
    found = calibrate_heads(model, bert, rows, (0.1,))
    turned = {
        name: dataclasses.replace(one, labels=tuple(max(one.labels or ()) - label for label in one.labels or ()))
        for name, one in rows.items()
    }
    other = calibrate_heads(model, bert, turned, (0.1,))
    assert any(not same_tensors(found.own[name].head, other.own[name].head) for name in TASKS)
    again = calibrate_heads(model, bert, rows, (0.1,))
    assert all(same_tensors(found.own[name].head, again.own[name].head) for name in TASKS)
    assert found.deltas == model.deltas
    assert found.parts == model.parts
    assert all(found.own[name].deltas == model.own[name].deltas for name in TASKS)


def test_no_rows_are_refused(bert: Encoder) -> None:
    model = merged(trio(bert), "task_arithmetic")
    for count in (0, 9):
        with pytest.raises(DataError, match=f"{count} rows; expected at least 10; give more rows"):
            calibrate_heads(model, bert, {name: one.take(range(count)) for name, one in some_rows().items()})


def test_a_calibrated_model_has_a_name_of_its_own_and_survives_its_file(bert: Encoder, tmp_path: Path) -> None:
    adapters, rows = trio(bert), some_rows()
    found = calibrate_heads(merged(adapters, "ties"), bert, rows, (0.1,))
    found = calibrate_scales(found, merge_inputs_of(adapters), bert, rows)
    mb.save(found, tmp_path / "a.safetensors")
    back = mb.load(tmp_path / "a.safetensors")
    assert isinstance(back, Merged)
    assert back.title == "ties + scales + heads"
    assert mb.describe(tmp_path / "a.safetensors")["role"] == back.title
    assert back.trace == found.trace
    assert figures(back, bert, rows) == figures(found, bert, rows)
    again = merged([back], "fedavg")  # type: ignore[list-item]
    assert again.title == "fedavg + scales + heads"
    for one in (back, again):
        with pytest.raises(CompositionError, match=r"task '\w+': 40 of 40 rows are .* has seen \(heads\)"):
            evaluate_model(Predictor(one, bert), lambda task: rows[task.name])


def test_one_expert_is_scaled_back_to_itself(encoder: Encoder) -> None:
    adapter = random_adapter(encoder, "sst")
    rows = {"sst": tiny_rows(adapter.task, 6)}
    model = merged([adapter], "task_arithmetic", {"sst": 0.25})
    found = calibrate_scales(model, inputs_of(adapter), encoder, rows)
    scales = found.trace["calibrated"]["scales"]["sites"]
    assert list(scales.values()) == pytest.approx([4.0] * len(model.deltas))
    for site, delta in adapter.deltas().items():
        if site in found.deltas:
            assert torch.allclose(found.deltas[site].dense(), delta.dense(), atol=1e-6)


def test_scales_make_the_merged_deltas_move_outputs_as_far_as_the_experts(bert: Encoder) -> None:
    """Measured on the inputs themselves, not by Gram matrices."""
    adapters, rows = trio(bert), some_rows(8)
    model = merged(adapters, "ties")
    found = calibrate_scales(model, merge_inputs_of(adapters), bert, rows)

    def energy(change: Mapping[str, Delta]) -> float:
        total = 0.0
        for one in adapters:
            inputs = site_inputs(bert, one, rows[one.name])
            delta = change[one.name].dense().double()
            total += float((inputs @ delta.T).square().sum(1).mean())
        return total

    wanted = energy({one.name: one.deltas()[ONE] for one in adapters})
    assert energy(dict.fromkeys(TASKS, found.deltas[ONE])) == pytest.approx(wanted, rel=1e-3)
    assert energy(dict.fromkeys(TASKS, model.deltas[ONE])) != pytest.approx(wanted, rel=1e-1)


def site_inputs(encoder: Encoder, adapter: mb.Adapter, rows: Rows) -> torch.Tensor:
    """What reaches the site when the expert reads the rows one by one."""
    part = adapter.part(adapter.name)
    tree = fold(encoder, part)
    model = classifier(tree, part.task, part.head)
    seen: list[torch.Tensor] = []
    model.encoder.get_submodule(ONE).register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    tokens = tokenise(rows, part.task, encoder.tokenizer, part.max_length, encoder.pad_token)
    with torch.no_grad():
        for row in range(len(tokens)):
            model(**tokens.batch([row]).padded())
    return torch.cat(seen).double()


def test_a_delta_of_zero_stays(bert: Encoder) -> None:
    adapter = random_adapter(bert, "sst")
    model = merged([adapter], "task_arithmetic", {"sst": 0.0})
    found = calibrate_scales(model, inputs_of(adapter), bert, {"sst": tiny_rows(adapter.task, 4)})
    assert not any(delta.dense().any() for delta in found.deltas.values())
    assert set(found.trace["calibrated"]["scales"]["sites"].values()) == {1.0}


def test_scales_need_the_inputs_of_the_merge(bert: Encoder) -> None:
    adapters = trio(bert)
    with pytest.raises(CompositionError, match="inputs that were not merged"):
        calibrate_scales(merged(adapters, "ties"), inputs_of(adapters[0]), bert, some_rows(4))


def test_steps_are_read_in_the_order_in_which_they_are_taken() -> None:
    assert read_steps("heads, scales") == ["scales", "heads"]
    assert read_steps("") == []
    with pytest.raises(UnknownNameError, match="calibration"):
        read_steps("heads,tails")
