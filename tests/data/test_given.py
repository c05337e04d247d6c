"""Rows in every form that a practitioner holds: the same rows in all of them, one clear error for all else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mergekit_bert.data.given import Tables, given_data, rows_of, texts_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import has_rows, load_rows, unlabelled_rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.errors import DataError, MbertError

TONE = Task(name="tone", kind="classify", text=("sentence",), labels=("poor", "good"), metrics=("accuracy",))
TEXTS, LABELS = ["a fine film", "dull", "so so"], ["good", "poor", "poor"]
PAIR = get_task("sts")
PAIRS, VALUES = [("a cat", "the cat"), ("one", "two")], [4.5, 0]


class Dataset:
    """What mbert needs of a table of datasets: its rows, one by one, as dicts; it has columns by name as well."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {name: values[place] for name, values in self._columns.items()}


COLUMNS = {"extra": [1, 2, 3], "sentence": TEXTS, "label": LABELS}
FORMS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: list(zip(TEXTS, LABELS, strict=True)),
    "lists": lambda: tuple(map(list, zip(TEXTS, LABELS, strict=True))),
    "a generator": lambda: (row for row in zip(TEXTS, LABELS, strict=True)),
    "columns": lambda: COLUMNS,
    "columns of numpy": lambda: {name: np.array(values) for name, values in COLUMNS.items()},
    "dicts": lambda: [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)],
    "pandas": lambda: pd.DataFrame(COLUMNS),
    "pandas, filtered": lambda: pd.DataFrame(COLUMNS | {"keep": [True] * 3}, index=[7, 7, 9]).query("keep"),
    "datasets": lambda: Dataset(COLUMNS),
    "Rows": lambda: Rows(tuple((text,) for text in TEXTS), (1.0, 0.0, 0.0), "mine"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str) -> None:
    labelled, bare = (rows_of("data", FORMS[form](), TONE, labelled=wanted) for wanted in (True, False))
    assert labelled.texts == bare.texts == tuple((text,) for text in TEXTS)
    assert labelled.labels == (1.0, 0.0, 0.0)
    assert bare.labels is None
    assert all(type(text) is str for row in labelled.texts for text in row)


def test_a_table_of_the_library_datasets_itself() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(COLUMNS)
    assert rows_of("data", table, TONE).fingerprint() == rows_of("data", COLUMNS, TONE).fingerprint()
    both = datasets.DatasetDict({"train": table, "validation": table.select([0, 1]), "test": table})
    data = given_data("data", both, [TONE], "train")
    assert [len(load_rows(TONE, split, data)) for split in ("train", "dev")] == [3, 2]


def test_pairs_and_values() -> None:
    frame = pd.DataFrame({"sentence1": ["a cat", "one"], "sentence2": ["the cat", "two"], "label": [4.5, 0]})
    tuples = [(*pair, value) for pair, value in zip(PAIRS, VALUES, strict=True)]
    for given in (frame, tuples, frame.to_dict("list"), frame.to_dict("records")):
        rows = rows_of("data", given, PAIR)
        assert (rows.texts, rows.labels) == (tuple(PAIRS), (4.5, 0.0))


@pytest.mark.parametrize("labels", [[1, 0, 0], np.array([1, 0, 0]), np.array([1.0, 0, 0], dtype=np.float32)])
def test_labels_are_parsed_by_the_tasks_kind(labels: Any) -> None:
    task = Task(name="t", kind="classify", text=("sentence",), labels=("0", "1"), metrics=("accuracy",))
    assert rows_of("data", {"sentence": TEXTS, "label": labels}, task).labels == (1.0, 0.0, 0.0)
    several = Task(name="m", kind="multilabel", text=("sentence",), labels=("x", "y"), metrics=("micro_f1",))
    assert rows_of("data", [("a", "x|y"), ("b", "")], several).labels == ((1, 1), (0, 0))


def test_a_file_is_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfine\tgood\n")
    for path in (tmp_path / "a.tsv", str(tmp_path / "a.tsv")):
        assert rows_of("data", path, TONE).texts == (("fine",),)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "data: None .NoneType.; expected a list of rows, a dict of columns, a table of pandas or"),
    "a number": (7, "data: 7 .int."),
    "bytes": (b"abc", "data: b'abc' .bytes."),
    "a set": ({("a", "good")}, "data: .* .set."),
    "a text, which is a path": ("a fine film", "a fine film: suffix ''"),
    "no rows": ([], "data: no rows"),
    "texts alone": (TEXTS, r"data, row 1: 1 values; expected \(sentence, label\), or a dict"),
    "rows of numbers": ([1, 2], "data, row 1: 1 .int."),
    "one cell too many": ([("a", "good"), ("a", "b", "good")], "data, row 2: 3 values"),
    "no column": (pd.DataFrame({"text": TEXTS}), r"data: no column 'sentence' \(found: text\)"),
    "no key": ([{"sentence": "a", "label": "good"}, {"sentence": "a"}], "data, row 2: no column 'label'"),
    "unequal columns": (
        {"sentence": TEXTS, "label": ["good"]},
        "data: columns of unequal length .3 in 'sentence', 1 in 'label'",
    ),
    "a column that is a text": ({"sentence": "abc", "label": "good"}, "data, column 'sentence': 'abc' .str."),
    "a hole": (pd.DataFrame({"sentence": ["a", None], "label": LABELS[:2]}), "data, row 2: (nothing|nan) in column"),
    "another label": ([("a", "fine")], "data, row 1: label 'fine'; expected one of poor, good"),
    "rows without labels": (Rows((("a",),), None, "mine"), "mine: rows without labels"),
    "rows of pairs": (
        Rows((("a", "b"),), (1.0,), "mine"),
        r"mine: wrong number of texts per row \(2\); expected 1: sentence",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_one_clear_error(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(DataError, match=f"^{message}") as caught:
        rows_of("data", given, TONE)
    assert "\n" not in str(caught.value)


def test_what_is_to_be_predicted_is_one_row_or_several() -> None:
    one, many = ("a fine film",), (("a fine film",), ("dull",), ("so so",))
    for given, expected in (("a fine film", (one, True)), (one, (one, True)), (TEXTS, (many, False))):
        rows, single = texts_of("texts", given, TONE)
        assert (rows.texts[0] if single else rows.texts, single) == expected
    for table in (COLUMNS, pd.DataFrame(COLUMNS), np.array(TEXTS), [(text,) for text in TEXTS], iter(TEXTS)):
        assert texts_of("texts", table, TONE)[0].texts == many
    assert texts_of("texts", ("a", "b"), PAIR) == (Rows((("a", "b"),), None, "texts"), True)
    assert texts_of("texts", PAIRS, PAIR)[0].texts == tuple(PAIRS)
    assert [len(texts_of("texts", none, TONE)[0]) for none in ([], pd.DataFrame(COLUMNS)[:0])] == [0, 0]
    for wrong, task in (
        (["a", "b"], PAIR),
        ("a", PAIR),
        (("a", "b"), TONE),
        ([("a", "b")], TONE),
        (3, TONE),
        ([3], TONE),
    ):
        with pytest.raises(DataError, match=r"^texts"):
            texts_of("texts", wrong, task)


def test_tables_by_task_and_split() -> None:
    rows = FORMS["tuples"]()
    data = given_data(
        "data", {"tone": {"train": iter(rows), "dev": rows[:1]}, "sts": [("a", "b", 1)]}, [TONE, PAIR], "dev"
    )
    assert isinstance(data, Tables)
    for _ in range(2):  # what can be read once is kept
        assert [len(load_rows(TONE, split, data)) for split in ("train", "dev")] == [3, 1]
    assert len(load_rows(PAIR, "dev", data)) == 1
    assert (has_rows(PAIR, "train", data), has_rows(PAIR, "dev", data)) == (False, True)
    with pytest.raises(DataError, match=r"^`data`: no train rows of 'sts' \(found: tone: train and dev, sts: dev\)"):
        load_rows(PAIR, "train", data)
    assert unlabelled_rows(TONE, data, {}).labels is None
    assert unlabelled_rows(TONE, data, {"tone": ["one", "two"]}).texts == (("one",), ("two",))
    for place in (None, "sample", Path("x")):
        assert given_data("data", place, [TONE], "dev") is place


@pytest.mark.parametrize("data", [7, [("a", "good")], {"tone": [], "other": []}, pd.DataFrame(COLUMNS)])
def test_several_tasks_need_their_names(data: Any) -> None:
    with pytest.raises(MbertError, match=r"^`data`: .*expected a folder, or tables by task: tone, sts"):
        given_data("data", data, [TONE, PAIR], "dev")


def test_one_task_needs_none() -> None:
    for data in (COLUMNS, {"tone": COLUMNS}, FORMS["tuples"](), {"train": COLUMNS}):
        assert len(load_rows(TONE, "train", given_data("data", data, [TONE], "train"))) == 3
