"""Held-out rows: those that training held out come first, each is read by one step, and the rest is told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import DataError, MbertWarning
from mergekit_bert.evaluation.held_out import held_out
from tests.adapters.helpers import random_adapter
from tests.evaluation.helpers import seen


def numbered(count: int) -> Rows:
    """Rows of different texts."""
    return Rows(tuple((f"text {number}",) for number in range(count)), (0.0,) * count, "numbered")


def trained_on(train: Rows, **changes: Any) -> dict[str, Any]:
    """What an adapter's record says of its training."""
    return {"data": train.fingerprint(), "seed": 0, "hold_out": 0.1, "hold_out_limit": 1000, **changes}


@pytest.mark.parametrize("changes", [{}, {"seed": 7}, {"hold_out": 0.2}, {"hold_out_limit": 9, "seed": 3}])
def test_the_rows_are_those_that_the_adapters_training_held_out(changes: dict[str, Any]) -> None:
    train, told = numbered(100), trained_on(numbered(100), **changes)
    truth = hold_out(train, told["hold_out"], told["hold_out_limit"], told["seed"])[1]
    found = held_out(train, 8, told)
    assert len(found.rows) == found.held_out == 8
    assert set(found.rows.texts) < set(truth.texts)
    assert held_out(train, 8, told) == found
    more = held_out(train, 30, told)
    assert (len(more.rows), more.held_out) == (30, len(truth))
    assert set(truth.texts) <= set(more.rows.texts)
    others = held_out(train, 8, told, found.rows.hashes())
    assert not set(others.rows.texts) & set(found.rows.texts)
    assert others.held_out == min(8, len(truth) - 8)


@pytest.mark.parametrize("training", [{}, {"peft_version": "1"}, trained_on(numbered(99))])
def test_without_a_record_of_these_rows_nothing_is_said_to_be_held_out(training: dict[str, Any]) -> None:
    found = held_out(numbered(100), 8, training)
    assert (len(found.rows), found.held_out) == (8, None)


def test_rows_to_score_on_are_not_taken_and_none_left_is_told() -> None:
    train = numbered(40)
    dev = train.take(range(0, 40, 2))
    assert not set(held_out(train, 40, {}, dev.hashes()).rows.texts) & set(dev.texts)
    assert len(held_out(train, 40, {}, dev.hashes()).rows) == 20
    with pytest.raises(DataError, match="40 rows, all of them scored on or used by another step"):
        held_out(train, 8, {}, train.hashes())


def trained(bert: Encoder, folder: Path, home: Path, **changes: Any) -> list[Path]:
    """Adapters whose records say that they were trained on the rows of ``home``."""
    paths = []
    for place, task in enumerate(("sst", "sts")):
        train = mb.load_rows(get_task(task), "train", home / "data")
        told = trained_on(train, **changes)
        paths.append(folder / f"{task}.safetensors")
        mb.save(dataclasses.replace(random_adapter(bert, task, start=4 * place), training=told), paths[-1])
    return paths


def test_search_and_heads_read_other_rows_of_those_held_out(
    bert: Encoder, home: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    files = trained(bert, tmp_path, home, seed=5, hold_out=0.5)
    model = mb.search(files, "ties", 1, home / "data", held_out=8, base=bert)
    model = mb.calibrate(model, home / "data", rows=10, base=bert)
    assert not recwarn.list
    dev = {task: set(mb.load_rows(get_task(task), "dev", home / "data").hashes()) for task in ("sst", "sts")}
    for task in ("sst", "sts"):
        train = mb.load_rows(get_task(task), "train", home / "data")
        truth = set(hold_out(train, 0.5, 1000, 5)[1].hashes())
        one, two = seen(model)["search", task], seen(model)["heads", task]
        assert one | two <= truth - dev[task]
        assert not one & two
    told = model.trace["search"]["rows"]["sst"], model.trace["calibrated"]["heads"]["rows"]["sst"]
    assert [one["held_out_in_training"] for one in told] == [8, 10]


def test_rows_that_an_adapter_may_have_learned_are_told(bert: Encoder, home: Path, tmp_path: Path) -> None:
    files = trained(bert, tmp_path, home, hold_out=0.1)
    with pytest.warns(
        MbertWarning, match="`evaluations`: the training of its adapter held out only 4 of the 20 rows of sst; "
    ):
        model = mb.search(files[:1], "ties", 1, home / "data", held_out=300, base=bert)
    assert model.trace["search"]["rows"]["sst"]["held_out_in_training"] == 4
    with pytest.warns(MbertWarning, match="`steps=heads`: the training of its adapter held out only 0 of the 10 rows"):
        model = mb.calibrate(model, home / "data", rows=10, base=bert)
    assert not seen(model)["search", "sst"] & seen(model)["heads", "sst"]
    with pytest.warns(
        MbertWarning, match="no record of whether the training of its adapter held out the 20 rows of sst; "
    ):
        mb.search([home / "adapters/sst.safetensors"], "ties", 1, home / "data", base=bert)
