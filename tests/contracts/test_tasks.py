"""What every registered task keeps to."""

import dataclasses
import json

import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.rows import parse_rows
from mergekit_bert.data.task import TASKS
from mergekit_bert.encoder.classifier import fresh_classifier, head_shapes
from mergekit_bert.encoder.head import head_config
from mergekit_bert.errors import DataError
from mergekit_bert.hardware import generator
from tests.tiny import tiny_rows


@pytest.fixture(params=TASKS.names())
def task(request: pytest.FixtureRequest) -> mb.Task:
    return TASKS.get(request.param)


def test_it_is_a_frozen_record_that_explains_itself(task: mb.Task) -> None:
    assert task.description
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]
    assert mb.get_task(task.name) is task


def test_its_metrics_are_of_its_kind_and_its_chance_is_below_one(task: mb.Task) -> None:
    assert task.metric == task.metrics[0]
    assert all(kind_of(task).fits(metric(name)) for name in task.metrics)
    assert 0 <= task.chance <= 0.5
    assert task.kind == "regress" or task.chance == pytest.approx(1 / len(task.labels))


def test_it_survives_json_without_the_place_of_its_rows(task: mb.Task) -> None:
    kept = json.loads(json.dumps(task.to_json()))
    again = mb.Task.from_json(kept)
    assert again == dataclasses.replace(task, hub=None, files=())
    assert again.to_json() == task.to_json()


def test_every_label_is_read_as_its_output(task: mb.Task) -> None:
    labels = task.labels if task.range is None else [str(bound) for bound in task.range]
    records = [("line", dict.fromkeys(task.text, "a text") | {task.label: label}) for label in labels]
    found = parse_rows("here", records, task, labelled=True).labels
    assert found == (task.range if task.range else tuple(range(task.outputs)))


@pytest.mark.parametrize("label", ["", "no such label", "-1000", "nan", None])
def test_a_label_it_does_not_have_is_refused(task: mb.Task, label: str | None) -> None:
    record = dict.fromkeys(task.text, "a text") | {task.label: label}
    with pytest.raises(DataError, match="here, line: label"):
        parse_rows("here", [("line", record)], task, labelled=True)


def test_a_head_has_its_outputs_and_names(bert: mb.Encoder, task: mb.Task) -> None:
    shapes = head_shapes(bert.config, task)
    assert shapes["classifier.bias"] == (task.outputs,)
    config = head_config(bert.config, task)
    assert config.num_labels == task.outputs == len(config.id2label)
    if task.kind == "classify":
        assert [config.id2label[index] for index in range(task.outputs)] == [
            task.display(index) for index in range(task.outputs)
        ]


def test_its_rows_go_through_an_encoder(bert: mb.Encoder, task: mb.Task) -> None:
    rows = tiny_rows(task, 5)
    inputs = bert.tokenizer(*[list(c) for c in zip(*rows.texts, strict=True)], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = fresh_classifier(bert, task, generator(0))(**inputs)
    assert outputs.shape == (5, task.outputs)
    assert outputs.isfinite().all()
