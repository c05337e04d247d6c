"""What every registered merge method keeps to, for every adapter type."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import TYPES, Adapter
from mergekit_bert.adapters.delta import Dense, LowRank
from mergekit_bert.adapters.file import check_part
from mergekit_bert.composing.file import read_model, write_model
from mergekit_bert.composing.method import METHODS, Method
from mergekit_bert.composing.prediction import Predictor
from tests.adapters.helpers import random_adapter, same_adapter, same_tensors
from tests.composing.helpers import ONE, merged, trio, zeroed
from tests.tiny import tiny_rows

TOLERANCE = 1e-6


@pytest.fixture(params=METHODS.names())
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS.get(request.param)


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv", train_bias=True)


def close(one: mb.Merged, two: mb.Merged, tolerance: float = TOLERANCE) -> None:
    """Check that two merges have the same Deltas and shifts."""
    assert one.deltas.keys() == two.deltas.keys()
    assert one.shifts.keys() == two.shifts.keys()
    for site in one.deltas:
        exact = two.deltas[site].dense()
        atol = tolerance * max(1.0, float(exact.abs().max()))
        np.testing.assert_allclose(one.deltas[site].dense(), exact, atol=atol)
    for name in one.shifts:
        np.testing.assert_allclose(one.shifts[name], two.shifts[name], atol=tolerance)


def test_it_is_a_frozen_record_that_explains_itself(method: Method) -> None:
    for text in (method.description, method.formula, method.source, method.default_weights, method.needs):
        assert text
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


def test_its_own_weights_are_one_finite_number_for_each(method: Method, three: list[Adapter]) -> None:
    for count in (1, 2, 3):
        weights = method.weights(three[:count])
        assert len(weights) == count
        assert all(math.isfinite(weight) for weight in weights)


@pytest.mark.parametrize("kind", TYPES.names())
@pytest.mark.parametrize("task", ["sst", "sts"])
def test_one_adapter_with_weight_one_is_itself(method: Method, bert: mb.Encoder, kind: str, task: str) -> None:
    one = random_adapter(bert, task, kind=kind, train_layernorm=True)
    model = merged([one], method.name, {task: 1.0})
    part = model.part(task)
    assert part.deltas.keys() == one.deltas().keys()
    for site, delta in one.deltas().items():
        exact = delta.dense()
        np.testing.assert_allclose(part.deltas[site].dense(), exact, atol=TOLERANCE * float(exact.abs().max()))
    assert same_tensors(part.shifts, one.shifts)
    assert same_tensors(model.own[task].head, one.head)


def test_the_order_of_the_adapters_does_not_matter(method: Method, three: list[Adapter]) -> None:
    if method.order_matters:
        assert "order" in method.description
        return
    weights = {"sst": 0.5, "sts": 1.5, "para": 0.25}
    first = merged(three, method.name, weights)
    for order in itertools.permutations(three):
        again = merged(order, method.name, weights)
        close(again, first, 1e-5)
        assert [task.name for task in again.tasks] == [one.name for one in order]


def test_the_same_adapters_give_the_same_bits(method: Method, three: list[Adapter]) -> None:
    torch.manual_seed(1)
    one = merged(three, method.name)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = merged(three, method.name)
    assert all(torch.equal(one.deltas[site].dense(), two.deltas[site].dense()) for site in one.deltas)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_leaves_its_inputs_alone(method: Method, three: list[Adapter]) -> None:
    kept = copy.deepcopy(three)
    merged(three, method.name)
    assert all(same_adapter(*pair) for pair in zip(three, kept, strict=True))


def test_every_head_is_kept(method: Method, three: list[Adapter]) -> None:
    model = merged(three, method.name)
    assert [task.outputs for task in model.tasks] == [5, 1, 2]
    for one in three:
        assert same_tensors(model.own[one.name].head, one.head)


def _uneven(bert: mb.Encoder) -> Sequence[Adapter]:
    return [
        random_adapter(bert, "sst", rank=2, targets="qv"),
        random_adapter(bert, "sts", rank=7, start=2, targets="attention", alpha=9.0),
        random_adapter(bert, "para", rank=1, start=9, targets=r".*\.output\.dense"),
    ]


def test_ranks_and_targets_may_differ(method: Method, bert: mb.Encoder) -> None:
    adapters = _uneven(bert)
    model = merged(adapters, method.name)
    sites = {site: size for one in adapters for site, size in one.sites.items()}
    assert {site: delta.shape for site, delta in model.deltas.items()} == sites
    for one in adapters:
        check_part(one.name, model.part(one.name), bert)
    for delta in model.deltas.values():
        assert delta.dense().dtype == torch.float32
        assert delta.dense().isfinite().all()


def test_a_site_of_one_adapter_alone_is_as_in_a_merge_of_it_alone(method: Method, bert: mb.Encoder) -> None:
    adapters = [random_adapter(bert, "sst", targets=ONE), random_adapter(bert, "sts", start=3, targets="qv")]
    weights = {"sst": 0.5, "sts": 1.0}
    model = merged(adapters, method.name, weights)
    for one in adapters:
        alone = merged([one], method.name, {one.name: weights[one.name]})
        for site, delta in alone.deltas.items():
            np.testing.assert_allclose(model.deltas[site].dense(), delta.dense(), atol=1e-5)


def test_zero_adapters_merge_to_zero(method: Method, three: list[Adapter]) -> None:
    model = merged([zeroed(one) for one in three], method.name)
    for delta in model.deltas.values():
        assert torch.equal(delta.dense(), torch.zeros(delta.shape))
    assert all(torch.equal(shift, torch.zeros_like(shift)) for shift in model.shifts.values())


@pytest.mark.parametrize("count", [1, 2])
def test_a_single_site_of_one_by_one_is_merged(method: Method, count: int) -> None:
    deltas = [LowRank(torch.tensor([[2.0]]), torch.tensor([[3.0]])), Dense(torch.tensor([[1.0]]))][:count]
    found = method.merge(deltas, [1.0] * count)
    assert found.shape == (1, 1)
    assert found.dense().isfinite().all()
    assert count > 1 or float(found.dense()) == pytest.approx(6)


def test_dense_deltas_are_merged_as_their_factors_are(method: Method, three: list[Adapter]) -> None:
    site = next(iter(three[0].sites))
    factors = [one.deltas()[site] for one in three]
    weights = [0.5, 1.0, 0.25]
    low, full = method.merge(factors, weights), method.merge([Dense(one.dense()) for one in factors], weights)
    np.testing.assert_allclose(low.dense(), full.dense(), atol=1e-5)


def test_the_merged_file_gives_the_model_back(method: Method, bert: mb.Encoder, tmp_path: Path) -> None:
    model = merged(_uneven(bert), method.name)
    write_model(tmp_path / "x", model)
    again = read_model(tmp_path / "x")
    assert isinstance(again, mb.Merged)
    close(again, model, 0)
    assert again.weights == model.weights
    write_model(tmp_path / "y", again)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_every_task_is_answered(method: Method, bert: mb.Encoder, three: list[Adapter]) -> None:
    predictor = Predictor(merged(three, method.name), bert)
    for one in three:
        outputs = predictor.outputs(one.name, tiny_rows(one.task, 6))
        assert outputs.shape == (6, one.task.outputs)
        assert np.isfinite(outputs).all()
        assert outputs.std() > 0
