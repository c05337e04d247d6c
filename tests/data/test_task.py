"""Tasks: built in or from YAML; a record that contradicts itself is refused, and says how."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_bert as mb
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.kind import KINDS
from mergekit_bert.data.synthetic import synthetic_rows
from mergekit_bert.data.task import TASKS, Task, get_task
from mergekit_bert.errors import DataError, MbertError, UnknownNameError
from mergekit_bert.schema import SchemaError

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
    (CLASSIFY, {"metric": "acuracy"}, "metric: 'acuracy'; expected one of accuracy, exact_match, f1"),
    (CLASSIFY, {"colour": "red"}, "unknown key 'colour'; expected keys among description, files, kind"),
    (CLASSIFY, {"files": {"test": "x"}}, "files is {'test': 'x'}; expected a mapping of train and dev to paths"),
    (CLASSIFY, {"files": {"dev": None}}, "files is {'dev': None}; expected a mapping"),
    (CLASSIFY, {"files": ["a.tsv"]}, "files is ['a.tsv']; expected a mapping"),
    (REGRESS, {"range": [5, 0]}, "range is (5.0, 0.0); expected [low, high] with low < high"),
    (REGRESS, {"range": [1, 1]}, "range is (1.0, 1.0); expected [low, high] with low < high"),
    (REGRESS, {"range": [float("nan"), 1]}, "line 5: .nan, which is no number"),
    (REGRESS, {"range": [0, float("inf")]}, "line 6: .inf, which is no number"),
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


@pytest.mark.parametrize("key", ["name", "kind", "text"])
def test_a_missing_key_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=f"no key '{key}'; expected name, kind and text at least"):
        get_task(write(tmp_path, {name: value for name, value in CLASSIFY.items() if name != key}))


def test_lists_and_single_names_do_as_well() -> None:
    made = Task("tone", "classify", "sentence", labels=["poor", "good"])
    assert made == Task("tone", "classify", ("sentence",), ("accuracy",), labels=("poor", "good"))
    assert hash(made) == hash(Task.from_json(made.to_json()))
    assert Task("s", "regress", ["a", "b"], range=[0.0, 5.0]).to_json()["range"] == (0.0, 5.0)
    for bounds in ([], [1.0], [0.0, 1.0, 2.0]):
        with pytest.raises(DataError, match="range"):
            Task("s", "regress", ["a", "b"], range=bounds)


LAUGHS = "name: a\nkind: classify\n" + "".join(
    f"{two}: &{two} [{', '.join([f'*{one}' if one else 'ha'] * 9)}]\n"
    for one, two in zip(["", *"bcdefgh"], "bcdefghi", strict=True)
)
HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", r"task.yml: not a mapping; expected a task in plain YAML"),
    "a list": ("- a\n- b", r"task.yml: not a mapping; expected a task in plain YAML"),
    "no end": ("name: [", r"task.yml, line 1: not YAML \(.*\); expected a task in plain YAML"),
    "a call": ("name: !!python/object/apply:os.getcwd []", r"line 1: the tag 'tag:yaml.org,2002:python/object/"),
    "latin-1": ("description: café".encode("latin-1"), r"task.yml: no text in UTF-8; "),
    "laughs": (LAUGHS, r"line 3: an anchor or alias; "),
    "brackets": ("name: " + "[" * 60_000, r"line 1: nested more than 64 deep; "),
    "digits": ("name: a\nrange: [0, " + "9" * 4300 + "]", r"line 2: a number of 4,300 digits; "),
    "far range": (f"name: a\nrange: [0, {10**400}]", r"line 2: a number of 401 digits; "),
    "infinite range": ("name: a\nrange: [0, 1.0e+999]", r"line 2: the number 1.0e\+999, which is not finite; "),
    "a key twice": ("name: a\nkind: b\nname: c", r"line 3: the key 'name' again; "),
    "an unknown key": ("name: a\nsize: 2", r"line 2: unknown key 'size'; expected keys among description, files, "),
    "a steering name": ('name: "a\\e[2J"\nkind: classify\ntext: b\nmetric: f1', r"task 'a\\x1b\[2J': name is 'a\\x1b"),
    "a long value": ("name: a\nkind: " + "x" * 60_000 + "\ntext: b\nmetric: f1", r"line 2: kind is 'x+…; expected"),
    "too long": ("# " + "x" * 70_000, r"task.yml: more than 65,536 bytes; "),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_one_quick_line(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "task.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        get_task(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2500


def test_dates_and_odd_numbers_are_labels_as_they_stand(tmp_path: Path) -> None:
    text = "name: a\nkind: classify\ntext: b\nmetric: f1\nlabels: [2020-13-45, 2020-01-01, 007, 0x10, 1:30, 1.50]"
    labels = ("2020-13-45", "2020-01-01", "007", "0x10", "1:30", "1.5")
    assert get_task(write(tmp_path, text)).labels == labels


def test_a_folder_and_a_pipe_are_no_task(tmp_path: Path) -> None:
    (tmp_path / "folder.yml").mkdir()
    os.mkfifo(tmp_path / "pipe.yml")
    for name, found in (("folder", "a folder"), ("pipe", "no regular file")):
        with pytest.raises(DataError, match=f"{name}.yml: {found}; "):
            get_task(tmp_path / f"{name}.yml")


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


LABEL = st.characters(
    exclude_categories=("Cc", "Cs", "Zl", "Zp"),
    exclude_characters="\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
)


@settings(deadline=None)
@given(
    st.lists(st.text(LABEL, min_size=1), min_size=2, max_size=5, unique=True),
    st.sampled_from(["accuracy", "f1", "matthews"]),
    st.sampled_from(["a", "a-b", "a_1"]),
)
def test_any_classification_comes_back(labels: list[str], metric: str, name: str) -> None:
    task = Task(name=name, kind="classify", text=("x",), metrics=(metric,), labels=tuple(labels))
    assert Task.from_json(task.to_json()) == task
    assert task.chance == (0 if metric == "matthews" else 1 / len(labels))


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"extra": 1}, "extra: "),
    "no name": ({"name": None}, "name: "),
    "a name that is a path": ({"name": "../up"}, "name is '../up'"),
    "a name without end": ({"name": "x" * 501}, "name is 'xxx.*up to 500 characters"),
    "a kind that is none": ({"kind": "rank"}, "kind is 'rank'; expected one of classify, multilabel, regress"),
    "a text that is a number": ({"text": 3}, "text: "),
    "a text that is no list": ({"text": "sentence"}, "text: "),
    "columns that are numbers": ({"text": [3]}, "text.0: "),
    "a column that steers": ({"text": ["a\x1b[2J"]}, r"text is 'a\\x1b\[2J'; expected .* no"),
    "a label column of lines": ({"label": "a\nb"}, r"label is 'a\\nb'"),
    "one label": ({"labels": ["0"]}, "two or more different labels"),
    "labels that are numbers": ({"labels": [0, 1]}, "labels.0: "),
    "a label that steers": ({"labels": ["a", "\x9bb"]}, r"labels is '\\x9bb'; expected .* none of them a control char"),
    "a label of lines": ({"labels": ["a", "b\nc"]}, r"labels is 'b\\nc'"),
    "half a pair": ({"labels": ["a", "\udc80"]}, "[Ss]urrogate"),
    "a label without end": ({"labels": ["a", "x" * 501]}, "labels is 'xxx"),
    "labels without end": ({"labels": [f"{n}" for n in range(10_001)], "label_names": []}, "labels, up to 10000"),
    "a name of a label that steers": ({"label_names": ["\u202e", *"abcd"]}, "label_names is "),
    "a description that steers": ({"description": "\x07"}, r"description is '\\x07'"),
    "a description without end": ({"description": "x" * 10_001}, "description is 'xxx"),
    "a description that is none": ({"description": None}, "description: "),
    "a range beside labels": ({"range": [0, 5]}, "no range: a classification has labels"),
    "a range of texts": ({"range": ["0", "5"]}, "range.0: "),
    "a range of three": ({"range": [0, 1, 2]}, "range"),
    "a metric twice": ({"metrics": ["f1", "f1"]}, "at least one metric, each once"),
    "a metric of nobody's": ({"metrics": ["speed"]}, "metric: 'speed'"),
    "rows of the Hub's": ({"hub": {"path": "a/b", "config": None, "columns": {}, "splits": {}}}, "hub: where the rows"),
    "rows of a file's": (
        {"files": [["train", "/etc/passwd"]]},
        "files: where the rows are is no part of a file's task",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_files_task_is_checked_key_by_key(sst: Task, name: str) -> None:
    change, message = FOREIGN[name]
    with pytest.raises((SchemaError, MbertError), match=message) as caught:
        Task.from_json(sst.to_json() | change)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("bounds", [[-2e9, 0.0], [0.0, 1e300], [0.0, 1e-9], [1.0, 0.0], [5, 5], [None, 1], [True, 2]])
def test_a_range_beyond_float32_is_refused(sts: Task, bounds: Any) -> None:
    with pytest.raises((SchemaError, DataError), match="range"):
        Task.from_json(sts.to_json() | {"range": bounds})


@pytest.mark.parametrize("value", [None, [], "sst", 3, {}])
def test_what_is_no_task_is_refused(value: Any) -> None:
    with pytest.raises(SchemaError):
        Task.from_json(value)


def test_texts_may_hold_tabs_and_a_description_lines() -> None:
    task = Task(
        name="t", kind="classify", text=("a b",), metrics=("f1",), labels=("a\tb", "ja"), description="one\n\ttwo"
    )
    assert Task.from_json(task.to_json()) == task


def test_a_task_that_steers_is_not_made_either() -> None:
    with pytest.raises(DataError, match=r"labels is '\\x1b'"):
        Task(name="t", kind="classify", text=("a",), metrics=("f1",), labels=("\x1b", "b"))


def test_a_task_of_several_labels_may_have_thresholds(tmp_path: Path) -> None:
    path = tmp_path / "topics.yml"
    text = "name: topics\nkind: multilabel\ntext: remark\nlabels: [a, b]\nmetric: micro_f1\nthresholds: "
    path.write_text(text + "[0.5, 0.25]\n")
    found = get_task(path)
    assert found.thresholds == (0.5, 0.25)
    assert Task.from_json(found.to_json()) == dataclasses.replace(found, files=())
    for wrong in ("[0.5]", "[0.5, 1.5]", "[0.5, yes]", "0.5"):
        path.write_text(text + wrong + "\n")
        with pytest.raises(DataError, match=r"thresholds is .*a probability"):
            get_task(path)


def test_a_kind_may_have_rows_of_more_texts(bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(KINDS.get("classify")), "texts", (3, 4))
    task = mb.Task("which", "classify", ("a", "b", "c"), ("accuracy",), labels=("1", "2", "3"))
    with pytest.raises(DataError, match=r"text is \['a', 'b'\]; expected 3 to 4 columns"):
        dataclasses.replace(task, text=("a", "b"))
    rows = synthetic_rows(task, (), 5)
    assert {len(row) for row in rows.texts} == {3}
    assert len({text for row in rows.texts for text in row}) > 10
    apart = tokenise(rows, task, bert.tokenizer, bert.max_length, bert.pad_token, apart=True)
    assert [len(parts) for parts in apart.parts] == [3] * 5
    with pytest.raises(DataError, match=r"3 texts a row, to be read together; .* use a `head` that reads texts apart"):
        tokenise(rows, task, bert.tokenizer, bert.max_length, bert.pad_token)
