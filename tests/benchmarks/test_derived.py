"""Derived tasks: every row is made from one of its source, and nothing else."""

from pathlib import Path

import pytest

from benchmarks.derived import rows_of, task_of
from mergekit_bert.data.readers import tsv_text

PARA = [
    ["sentence1", "sentence2", "label"],
    ["What is red?", "x", "1"],
    ["how  so?", "x", "0"],
    ["Is it?", "x", "0"],
    ["Why", "x", "0"],
]
SST = [["sentence", "label"], *([f"a film of {label}", str(label)] for label in range(5))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, lines in (("para", PARA), ("sst", SST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tsv").write_text(tsv_text(lines))
    return tmp_path


def test_a_question_loses_the_word_it_began_with(data: Path) -> None:
    rows, labels = rows_of("asks", "train", data), task_of("asks").labels
    assert rows.labels is not None
    found = [(texts[0], labels[int(label)]) for texts, label in zip(rows.texts, rows.labels, strict=True)]
    assert found == [("is red?", "what"), ("so?", "how"), ("it?", "other")]


def test_neutral_rows_have_no_side(data: Path) -> None:
    rows = rows_of("polar", "train", data)
    assert rows.labels == (0.0, 0.0, 1.0, 1.0)
    assert [texts[0][-1] for texts in rows.texts] == ["0", "1", "3", "4"]


def test_other_tasks_are_as_they_are(data: Path) -> None:
    assert task_of("sst").outputs == 5
    assert len(rows_of("sst", "train", data)) == 5
