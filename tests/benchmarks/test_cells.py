"""Intervals over sets and rows, and a set's cells on tiny models: what they keep of the ensemble."""

import numpy as np
import pytest

import mergekit_bert as mb
from benchmarks.cells import Set, draws, held_out, interval, markdown, open_sets, redrawn
from tests.corpus import write_corpus
from tests.training.runs import quick

TASKS = ("sst", "sts")


@pytest.fixture(scope="module")
def one(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Set:
    folder = tmp_path_factory.mktemp("sets")
    write_corpus(folder / "data", TASKS, train=40, dev=12)
    for task in TASKS:
        path = folder / f"orthogonal_0/{task}.safetensors"
        mb.train_adapter(task, folder / "data", path, base=bert, adapter=mb.AdapterConfig(rank=2), train=quick())
    (found,) = open_sets(folder, TASKS, folder / "data", folder / "kept", 10, bert)
    return found


def test_an_interval_holds_the_mean_and_equal_draws_have_no_width() -> None:
    low, high = interval(np.full((3, 50), 97.0))
    assert low == high == 97.0
    spread = np.random.default_rng(0).normal(90, 2, (3, 500))
    low, high = interval(spread)
    assert low < spread.mean() < high


def test_a_set_is_scored_on_its_dev_rows(one: Set) -> None:
    assert (one.name, one.basis) == ("orthogonal_0", "orthogonal")
    assert [len(rows) for _, rows in one.dev.values()] == [10, 10]
    whole = one.result(TASKS, "ensemble", {"method": "ensemble"})
    assert whole.percent == 100
    half = one.result(TASKS, "half", {"method": "task_arithmetic", "weight": 0.5})
    assert half.cell.recipe.weights == {"sst": 0.5, "sts": 0.5}
    assert half.percent == pytest.approx(100 * half.overall / whole.overall)
    index = draws(one.dev)
    index = {name: np.arange(10)[None] for name in index}
    assert redrawn(one.dev, half.cell, index) == pytest.approx([half.overall])


def test_options_are_chosen_on_what_training_held_out(one: Set) -> None:
    apart = held_out(one, 10)
    for name in TASKS:
        scored, given = set(apart.dev[name][1].hashes()), set(apart.train[name].hashes())
        assert scored
        assert not scored & given
        assert scored <= set(one.train[name].hashes())


def test_a_calibrated_cell_is_the_merge_after_its_step(one: Set) -> None:
    cell = one.cell(TASKS, {"method": "fedavg", "calibrate": ("scales",)})
    assert cell.name == "fedavg + scales"
    plain = one.cell(TASKS, {"method": "fedavg"})
    assert any(not np.array_equal(cell.outputs[name], plain.outputs[name]) for name in TASKS)


def test_a_table_has_a_line_for_each() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
