"""Where rows come from: a folder, the sample, data/, or the Hub; never the sample unless it is asked for."""

import builtins
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_bert.data import sample
from mergekit_bert.data.rows import Rows, read_rows
from mergekit_bert.data.source import DEFAULT_FOLDER, has_rows, load_rows, unlabelled_rows, write_sample
from mergekit_bert.data.task import HubSource, Task, get_task
from mergekit_bert.errors import DataError, MissingExtraError, OutputError

GENERATE = functools.cache(sample.generate)  # it takes a second a task, and gives the same rows every time


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, and the Hub's client keeps its copies in it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sample, "generate", GENERATE)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def write_sst(folder: Path, text: str = "good", splits: tuple[str, ...] = ("train", "dev")) -> Path:
    (folder / "sst").mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / "sst" / f"{split}.tsv").write_text(f"sentence\tlabel\n{text} {split}\t3\n")
    return folder


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_a_named_folder_is_read(sst: Task, tmp_path: Path) -> None:
    folder = write_sst(tmp_path / "mine")
    assert load_rows(sst, "dev", folder).texts == load_rows(sst, "dev", str(folder)).texts == (("good dev",),)


@pytest.mark.parametrize("same", [True, False])
def test_a_tasks_own_files_and_a_named_folder_may_not_disagree(sst: Task, tmp_path: Path, same: bool) -> None:
    folder = write_sst(tmp_path / "mine")
    own = folder if same else write_sst(tmp_path / "own", "fine")
    task = dataclasses.replace(sst, files=(("dev", str(own / "sst" / "dev.tsv")),))
    assert load_rows(task, "dev").texts == load_rows(task, "dev", tmp_path).texts
    if same:
        assert load_rows(task, "dev", folder).texts == (("good dev",),)
    else:
        with pytest.raises(DataError, match=r"own/sst/dev.tsv \(the task's files\) and \S+mine/sst/dev.tsv \(`data`\)"):
            load_rows(task, "dev", folder)


def test_the_folder_data_is_read_where_none_is_named(sst: Task, elsewhere: Path) -> None:
    write_sst(elsewhere / DEFAULT_FOLDER)
    assert load_rows(sst, "train").texts == (("good train",),)


def test_a_named_folder_comes_before_the_folder_data(sst: Task, elsewhere: Path, tmp_path: Path) -> None:
    write_sst(elsewhere / DEFAULT_FOLDER, "default")
    assert load_rows(sst, "train", write_sst(tmp_path / "mine", "named")).texts == (("named train",),)


def test_a_tasks_own_file_comes_first(sst: Task, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("sentence,label\nown,0\n")
    task = dataclasses.replace(sst, files=(("train", str(tmp_path / "own.csv")),))
    assert load_rows(task, "train", write_sst(tmp_path / "mine", splits=("dev",))).texts == (("own",),)
    assert load_rows(task, "dev", write_sst(tmp_path / "mine")).texts == (("good dev",),)


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("name", sample.SAMPLE_TASKS)
def test_the_sample_comes_when_it_is_asked_for(name: str, split: str) -> None:
    task, rows = get_task(name), sample.generate(name, split)
    found = load_rows(task, split, "sample")
    assert found.texts == tuple(texts for texts, _ in rows)
    assert found.labels == tuple(float(label) for _, label in rows)


def test_a_folder_called_sample_is_named_by_its_path(sst: Task, elsewhere: Path) -> None:
    write_sst(elsewhere / "sample")
    assert load_rows(sst, "train", "./sample").texts == (("good train",),)


def test_the_sample_has_only_its_own_tasks(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"`data=sample`: no rows for the task 'cfimdb'; expected one of sst, para, sts"
    ):
        load_rows(get_task("cfimdb"), "train", "sample")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, r"mine: no such folder; expected a folder that holds sst/train.tsv; check `data`"),
        ("mine", r"mine/sst: no file for the split 'train'; expected train.tsv, .csv, .jsonl or .parquet"),
        ("mine/sst/train.tsv", r"mine/sst: no file for the split 'train'"),
    ],
)
def test_a_named_folder_without_the_rows_is_an_error_and_nothing_else_is_tried(
    sst: Task, elsewhere: Path, made: str | None, message: str
) -> None:
    write_sst(elsewhere / DEFAULT_FOLDER)
    if made:
        (elsewhere / made).mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        load_rows(sst, "train", elsewhere / "mine")


def test_a_folder_data_without_the_split_does_not_fall_through_to_the_hub(
    sst: Task, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    write_sst(elsewhere / DEFAULT_FOLDER, splits=("train",))
    with pytest.raises(DataError, match="no file for the split 'dev'"):
        load_rows(sst, "dev")


THREE_WAYS = r"give `data=DIR`, use `data=sample`, or install mbert\[hub\]"


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_without_rows_and_network_the_error_names_the_three_ways(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    with pytest.raises(
        DataError, match=f"no folder data/{task}, and the Hub's .* gave: no route to host; .*{THREE_WAYS}"
    ):
        load_rows(get_task(task), "train")


def test_without_the_package_the_error_names_the_three_ways(sst: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=f"no folder data/sst and no package datasets; .*{THREE_WAYS}"):
        load_rows(sst, "train")


def test_a_task_without_a_place_on_the_hub_says_so() -> None:
    with pytest.raises(DataError, match=r"no folder data/cfimdb and no place on the Hub; expected cfimdb/train.tsv"):
        load_rows(get_task("cfimdb"), "train")


def test_no_error_falls_back_to_the_sample(sst: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_network(monkeypatch)
    monkeypatch.setattr(sample, "generate", lambda *_: pytest.fail("the sample was used"))
    for data in (None, tmp_path / "none", "none"):
        with pytest.raises(DataError):
            load_rows(sst, "train", data)


HUB_ROWS = {
    "sst": [
        {"text": "good", "label": 4, "label_text": "very positive"},
        {"text": "bad", "label": 0, "label_text": "x"},
    ],
    "para": [{"question1": "a?", "question2": "b?", "label": 1, "idx": 7}],
    "sts": [{"sentence1": "A.", "sentence2": "B.", "label": 3.8, "idx": 7}],
}
HUB_FOUND = {
    "sst": ((("good",), ("bad",)), (4.0, 0.0)),
    "para": ((("a?", "b?"),), (1.0,)),
    "sts": ((("A.", "B."),), (3.8,)),
}


def on_local_hub(task: Task, folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Task:
    """``task`` with its place on the Hub replaced by a local folder that the same client reads."""
    folder.mkdir()
    for split, records in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert task.hub is not None
    return dataclasses.replace(task, hub=dataclasses.replace(task.hub, path=str(folder), config=None))


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hub_is_read_where_there_is_no_folder(name: str, tmp_path: Path) -> None:
    rows = {"train": HUB_ROWS[name], "validation": HUB_ROWS[name][:1]}
    task = on_local_hub(get_task(name), tmp_path / "hub", rows)
    texts, labels = HUB_FOUND[name]
    found = load_rows(task, "train")
    assert (found.texts, found.labels) == (texts, tuple(pytest.approx(label) for label in labels))
    assert load_rows(task, "dev").texts == texts[:1]


def test_a_bad_label_on_the_hub_is_told_by_its_row(sst: Task, tmp_path: Path) -> None:
    task = on_local_hub(sst, tmp_path / "hub", {"train": [{"text": "a", "label": 1}, {"text": "b", "label": -1}]})
    with pytest.raises(DataError, match=r"train, row 2: label -1; expected one of 0, 1, 2, 3, 4"):
        load_rows(task, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"nothing": "sentence"}, "the Hub's .* gave: "), ({}, r"no column 'sentence' \(found: text, label\)")],
)
def test_other_columns_on_the_hub_are_told(sst: Task, tmp_path: Path, columns: dict[str, str], message: str) -> None:
    task = on_local_hub(sst, tmp_path / "hub", {"train": [{"text": "a", "label": 1}]})
    assert task.hub is not None
    task = dataclasses.replace(task, hub=dataclasses.replace(task.hub, columns=columns))
    with pytest.raises(DataError, match=message):
        load_rows(task, "train")


def test_built_in_places_on_the_hub_are_asked_for_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def note(path: str, config: str | None, split: str) -> None:
        asked.append((path, config, split))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", note)
    for name in ("sst", "para", "sts"):
        for split in ("train", "dev"):
            with pytest.raises(DataError):
                load_rows(get_task(name), split)
    assert asked == [
        ("SetFit/sst5", None, "train"),
        ("SetFit/sst5", None, "validation"),
        ("nyu-mll/glue", "qqp", "train"),
        ("nyu-mll/glue", "qqp", "validation"),
        ("nyu-mll/glue", "stsb", "train"),
        ("nyu-mll/glue", "stsb", "validation"),
    ]


def test_the_hubs_client_is_imported_only_when_it_is_needed(
    sst: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = builtins.__import__

    def guarded(name: str, *rest: Any) -> Any:
        assert name != "datasets"
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert isinstance(load_rows(sst, "train", write_sst(tmp_path / "mine")), Rows)


def test_whether_there_is_a_split_at_all(sst: Task, elsewhere: Path, tmp_path: Path) -> None:
    folder = write_sst(tmp_path / "mine", splits=("train",))
    assert [has_rows(sst, split, folder) for split in ("train", "dev")] == [True, False]
    assert has_rows(sst, "dev", "sample")
    assert not has_rows(get_task("cfimdb"), "dev", "sample")
    assert has_rows(sst, "dev")  # on the Hub
    assert not has_rows(get_task("cfimdb"), "dev")
    write_sst(elsewhere / DEFAULT_FOLDER, splits=("train",))
    assert not has_rows(sst, "dev")
    assert has_rows(dataclasses.replace(sst, files=(("dev", "x.tsv"),)), "dev", folder)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize("label", ["absent", "poisoned"])
def test_labels_that_nobody_asks_for_are_not_read(sst: Task, tmp_path: Path, suffix: str, label: str) -> None:
    path = tmp_path / "sst" / f"train.{suffix}"
    path.parent.mkdir()
    record = {"sentence": "good film"} | ({"label": "poison"} if label == "poisoned" else {})
    comma = "," if suffix == "csv" else "\t"
    path.write_text(json.dumps(record) if suffix == "jsonl" else f"{comma.join(record)}\n{comma.join(record.values())}")
    for task in (sst, dataclasses.replace(sst, files=(("train", str(path)),))):
        found = load_rows(task, "train", tmp_path, labelled=False)
        assert (found.texts, found.labels) == ((("good film",),), None)
    message = "no column 'label'" if label == "absent" else "label 'poison'"
    with pytest.raises(DataError, match=f"{path}.*: {message}"):
        load_rows(sst, "train", tmp_path)


def test_the_sample_and_the_hub_give_rows_without_labels_too(sst: Task, tmp_path: Path) -> None:
    found = load_rows(sst, "dev", "sample", labelled=False)
    assert (found.texts, found.labels) == (load_rows(sst, "dev", "sample").texts, None)
    for name, rows in (("absent", [{"text": "a"}]), ("poisoned", [{"text": "a", "label": "poison"}])):
        found = load_rows(on_local_hub(sst, tmp_path / name, {"train": rows}), "train", labelled=False)
        assert (found.texts, found.labels) == ((("a",),), None)


def test_plain_texts_come_first_then_the_folder_and_nothing_after(
    sst: Task, sts: Task, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    write_sst(elsewhere / DEFAULT_FOLDER)
    folder = write_sst(tmp_path / "mine")
    (tmp_path / "plain.txt").write_text("plain one\n")
    texts = {"sst": tmp_path / "plain.txt"}
    assert unlabelled_rows(sst, folder, texts).texts == unlabelled_rows(sst, None, texts).texts == (("plain one",),)
    assert unlabelled_rows(sst, folder, {"sts": "x.txt"}) == load_rows(sst, "train", folder, labelled=False)
    assert unlabelled_rows(sst, None, {}).texts == (("good train",),)
    for task, data, found in ((sst, None, "none"), (sts, folder, f"none in {folder}"), (sst, "no", "none in no")):
        expected = f"task '{task.name}': {found}; .* in `data=DIR`.*`texts={task.name}=FILE`"
        with pytest.raises(DataError, match=expected):
            unlabelled_rows(task, data, {"para": "x.txt"})


def test_the_written_sample_reads_back_as_the_sample(tmp_path: Path) -> None:
    paths = write_sample(tmp_path / "corpus")
    assert [str(path.relative_to(tmp_path / "corpus")) for path in paths] == [
        f"{task}/{split}.tsv" for task in sample.SAMPLE_TASKS for split in ("train", "dev")
    ]
    for path in paths:
        task = get_task(path.parent.name)
        assert read_rows(path, task).fingerprint() == load_rows(task, path.stem, "sample").fingerprint()
    with pytest.raises(OutputError, match="it exists already"):
        write_sample(tmp_path / "corpus")


def test_a_hub_source_is_a_plain_record() -> None:
    source = HubSource("a/b", None, {"x": "y"}, {"train": "train"})
    assert dataclasses.replace(source) == source
