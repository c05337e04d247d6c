"""MergeInputs: what an input is known by."""

import dataclasses
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.composing.merge_input import of_adapter, of_merged
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.composition import Merged
from tests.composing.helpers import merged, trio


@pytest.fixture
def one(bert: mb.Encoder) -> Merged:
    return merged(trio(bert, targets="qv", train_bias=True), "task_arithmetic", private=1)


def test_an_adapter_is_known_by_its_file(bert: mb.Encoder) -> None:
    adapter = trio(bert)[0]
    assert of_adapter(adapter).identify() == {"sst": adapter.sha256()}


def test_a_merge_is_known_by_what_it_answers_and_not_by_its_adapters(one: Merged) -> None:
    known = of_merged(one).identify()
    assert list(known) == ["sst", "sts", "para"]
    site, shift = next(iter(one.deltas)), next(iter(one.shifts))
    own = one.own["sts"]
    changed = {
        "a Delta": dataclasses.replace(one, deltas={**one.deltas, site: one.deltas[site].scaled(1.01)}),
        "a shift": dataclasses.replace(one, shifts={**one.shifts, shift: one.shifts[shift] * 1.01}),
        "a Delta elsewhere": dataclasses.replace(one, deltas={f"{name}x": delta for name, delta in one.deltas.items()}),
    }
    for what, other in changed.items():
        found = of_merged(other).identify()
        assert all(found[task] != known[task] for task in known), what
    other = dataclasses.replace(
        one, own={**one.own, "sts": dataclasses.replace(own, head={k: v + 1 for k, v in own.head.items()})}
    )
    assert {task for task, value in of_merged(other).identify().items() if value != known[task]} == {"sts"}
    other = dataclasses.replace(one, own={**one.own, "sts": dataclasses.replace(own, deltas={}, shifts={})})
    assert {task for task, value in of_merged(other).identify().items() if value != known[task]} == {"sts"}


def test_a_merge_is_known_again_in_its_file(one: Merged, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, one)
    found = read_model(path)
    assert isinstance(found, Merged)
    assert of_merged(found).identify() == of_merged(one).identify()


def test_a_merge_of_whole_checkpoints_has_no_files_to_be_known_by(one: Merged) -> None:
    bare = dataclasses.replace(one, parts={task: {**part, "sha256": ""} for task, part in one.parts.items()})
    assert len(set(of_merged(bare).identify().values())) == 3


def test_it_says_whether_its_deltas_are_read_on_demand(bert: mb.Encoder) -> None:
    for lazy in (False, True):
        model = mb.merge(trio(bert, targets="qv"), "fedavg", lazy=lazy)
        assert isinstance(model, Merged)
        assert (model.lazy, of_merged(model).lazy, model.shared.lazy) == (lazy,) * 3
    assert not of_adapter(trio(bert)[0]).lazy
