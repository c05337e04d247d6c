"""Tasks: built in or from YAML; a record that contradicts itself is refused, and says how."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert.data.task import TASKS, Task, get_task
from mergekit_bert.errors import DataError, MbertError, UnknownNameError

CLASSIFY: dict[str, Any] = {
    "name": "trec",
    "kind": "classify",
    "text": ["question"],
    "label": "kind",
    "labels": ["0", "1", "2"],
    "metric": "accuracy",
}
REGRESS: dict[str, Any] = {
    "name": "rank",
    "kind": "regress",
    "text": ["one", "two"],
    "range": [0, 5],
    "metric": "spearman",
}


def write(folder: Path, value: Any, name: str = "task.yml") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value), encoding="utf-8")
    return path


def test_a_classification_from_yaml(tmp_path: Path) -> None:
    found = get_task(write(tmp_path, CLASSIFY | {"label_names": ["a", "b", "ç"], "description": "what it asks"}))
    assert found == Task(
        name="trec",
        kind="classify",
        text=("question",),
        metrics=("accuracy",),
        label="kind",
        labels=("0", "1", "2"),
        label_names=("a", "b", "ç"),
        description="what it asks",
    )
    assert (found.outputs, found.metric, found.chance, found.display(2)) == (3, "accuracy", 1 / 3, "ç")


def test_a_regression_of_pairs_from_yaml(tmp_path: Path) -> None:
    found = get_task(str(write(tmp_path, REGRESS, "task.yaml")))
    assert (found.text, found.range, found.label) == (("one", "two"), (0.0, 5.0), "label")
    assert (found.outputs, found.metric, found.chance) == (1, "spearman", 0.0)


def test_one_column_and_one_label_need_no_list_and_numbers_need_no_quotes(tmp_path: Path) -> None:
    found = get_task(
        write(tmp_path, "{name: x, kind: classify, text: a, labels: [1, 2.5, no-1], metric: [f1, accuracy]}")
    )
    assert (found.text, found.labels, found.metrics, found.display(0)) == (
        ("a",),
        ("1", "2.5", "no-1"),
        ("f1", "accuracy"),
        "1",
    )


def test_files_lie_beside_the_yaml_or_where_they_say(tmp_path: Path) -> None:
    found = get_task(write(tmp_path, CLASSIFY | {"files": {"train": "rows/a.tsv", "dev": "/elsewhere/b.csv"}}))
    assert dict(found.files) == {"train": str(tmp_path / "rows/a.tsv"), "dev": "/elsewhere/b.csv"}


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (CLASSIFY, {"name": "two words"}, "name is 'two words'; expected letters, digits, '-' and '_'"),
    (CLASSIFY, {"name": "../up"}, "name is '../up'"),
    (CLASSIFY, {"name": None}, "name is None; expected text"),
    (CLASSIFY, {"name": ["a", "b"]}, "name is ['a', 'b']; expected one text"),
    (CLASSIFY, {"kind": "rank"}, "kind is 'rank'; expected one of classify, multilabel, regress"),
    (CLASSIFY, {"kind": {"a": 1}}, "kind is {'a': 1}; expected text"),
    (CLASSIFY, {"text": []}, "text is []; expected one or two columns"),
    (CLASSIFY, {"text": ["a", "b", "c"]}, "text is ['a', 'b', 'c']; expected one or two columns"),
    (CLASSIFY, {"text": ["a", "a"]}, "text is ['a', 'a']; expected columns that differ from each other"),
    (CLASSIFY, {"text": "kind"}, "text is ['kind']; expected columns that differ from each other and from the label"),
    (CLASSIFY, {"text": [None]}, "text is [None]; expected text"),
    (CLASSIFY, {"label": None}, "label is None; expected text"),
    (CLASSIFY, {"labels": ["0"]}, "labels is ['0']; expected two or more different labels"),
    (CLASSIFY, {"labels": ["0", "0"]}, "labels is ['0', '0']; expected two or more different labels"),
    (CLASSIFY, {"labels": [1, "1"]}, "labels is ['1', '1']; expected two or more different labels"),
    (CLASSIFY, {"labels": [True, False]}, "labels is [True, False]; expected text or numbers (quote words like yes"),
    (CLASSIFY, {"label_names": ["only"]}, "label_names is ['only']; expected one name for each label"),
    (CLASSIFY, {"range": [0, 1]}, "range is (0.0, 1.0); expected no range: a classification has labels"),
    (CLASSIFY, {"metric": "pearson"}, "metric is 'pearson'; expected a metric of a task of kind 'classify'"),
    (CLASSIFY, {"metric": []}, "metric is []; expected at least one metric"),
    (CLASSIFY, {"metric": "acuracy"}, "metric: 'acuracy'; expected one of accuracy, exact_match, f1"),
    (CLASSIFY, {"colour": "red"}, "unknown key 'colour'; expected keys among description, files, kind"),
    (CLASSIFY, {"files": {"test": "x"}}, "files is {'test': 'x'}; expected a mapping of train and dev to paths"),
    (CLASSIFY, {"files": {"dev": None}}, "files is {'dev': None}; expected a mapping"),
    (CLASSIFY, {"files": ["a.tsv"]}, "files is ['a.tsv']; expected a mapping"),
    (REGRESS, {"range": [5, 0]}, "range is (5.0, 0.0); expected [low, high] with low < high"),
    (REGRESS, {"range": [1, 1]}, "range is (1.0, 1.0); expected [low, high] with low < high"),
    (REGRESS, {"range": [float("nan"), 1]}, "range is (nan, 1.0)"),
    (REGRESS, {"range": [0, float("inf")]}, "range is (0.0, inf)"),
    (REGRESS, {"range": None}, "range is None; expected [low, high]"),
    (REGRESS, {"range": [0]}, "range is [0]; expected two numbers"),
    (REGRESS, {"range": "0-5"}, "range is '0-5'; expected two numbers"),
    (REGRESS, {"range": [False, True]}, "range is [False, True]; expected two numbers"),
    (REGRESS, {"labels": ["a", "b"]}, "labels is ['a', 'b']; expected no labels: a regression has a range"),
    (REGRESS, {"metric": "f1"}, "metric is 'f1'; expected a metric of a task of kind 'regress'"),
]


@pytest.mark.parametrize(("base", "change", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_line_that_names_the_key(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(MbertError, match=re.escape(message)) as caught:
        get_task(write(tmp_path, base | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "kind", "text", "metric"])
def test_a_missing_key_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=f"no key '{key}'; expected name, kind, text and metric at least"):
        get_task(write(tmp_path, {name: value for name, value in CLASSIFY.items() if name != key}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a NoneType; expected a mapping of keys"),
        ("- a\n- b", "a list; expected a mapping of keys"),
        ("name: [", "not readable as YAML"),
        ("name: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_what_is_no_yaml_mapping_is_told(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        get_task(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_yaml_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "task.yml").write_bytes("description: café".encode("latin-1"))
    with pytest.raises(DataError, match="not readable as YAML"):
        get_task(tmp_path / "task.yml")


def test_a_missing_yaml_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.yml: no such file; expected a task's YAML file"):
        get_task(tmp_path / "none.yml")


@pytest.mark.parametrize(("name", "near"), [("st", "sts"), ("parra", "para"), ("cfimbd", "cfimdb")])
def test_an_unknown_task_suggests_the_near_one(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"task: '{name}'; .*, or a .yml file; did you mean '{near}'\?"):
        get_task(name)


def test_an_unknown_task_far_from_all_lists_them() -> None:
    with pytest.raises(UnknownNameError, match=r"expected one of cfimdb, para, sst, sts, or a .yml file; choose"):
        get_task("zzzzzz")


@pytest.mark.parametrize("task", list(TASKS), ids=TASKS.names())
def test_a_record_comes_back_from_a_files_metadata(task: Task) -> None:
    assert Task.from_json(task.to_json()) == dataclasses.replace(task, hub=None, files=())
    assert "hub" not in task.to_json()
    assert "files" not in task.to_json()
    assert get_task(task) is task
    assert len(task.label_names) in (0, task.outputs)


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True),
    st.sampled_from(["accuracy", "f1", "matthews"]),
    st.sampled_from(["a", "a-b", "a_1"]),
)
def test_any_classification_comes_back(labels: list[str], metric: str, name: str) -> None:
    task = Task(name=name, kind="classify", text=("x",), metrics=(metric,), labels=tuple(labels))
    assert Task.from_json(task.to_json()) == task
    assert task.chance == (0 if metric == "matthews" else 1 / len(labels))


@pytest.mark.parametrize("change", [{"extra": 1}, {"kind": "rank"}, {"labels": ["0"]}, {"range": [0, 5]}])
def test_broken_metadata_is_refused(sst: Task, change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, DataError)):
        Task.from_json(sst.to_json() | change)
