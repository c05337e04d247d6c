"""Synthetic texts: the same everywhere, without labels, of the kinds and in the shares that they are said to be."""

from collections import Counter
from pathlib import Path

import pytest

from mergekit_bert.data.rows import Rows
from mergekit_bert.data.sample import SAMPLE_TASKS, generate
from mergekit_bert.data.source import SYNTHETIC, has_rows, load_rows, unlabelled_rows
from mergekit_bert.data.synthetic import FEWEST_WORDS, synthetic_rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.errors import DataError

WORDS = [f"q{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)]
"""A vocabulary that shares no word with the sample corpus."""
TRAIN = [texts for task in SAMPLE_TASKS for texts, _ in generate(task, "train")]
SENTENCES = {text for texts in TRAIN for text in texts}
COUNT = 3000
CLOSE = 0.035
"""About four standard errors of a share of so many rows."""

SHA256 = {
    "sst": "b34ef373aafc447ead44761bdce89a51b5772f45823eea1553ea6936d549f5e5",
    "para": "4aede1ddf7380e9642a3ae3fdbf62f6acb8e01e0802e61fd184061917018910a",
    "sts": "3f02408cf1eb209ae35d1e9dd3062a00fb6a63d5c8f62a1565e2d77e97f69a80",
}


@pytest.fixture(scope="module")
def made() -> dict[str, Rows]:
    return {task: synthetic_rows(get_task(task), WORDS, COUNT) for task in SAMPLE_TASKS}


def share(good: list[bool]) -> float:
    return sum(good) / len(good)


def random_words(text: str) -> bool:
    return set(text.split()) <= set(WORDS)


@pytest.mark.parametrize("task", SAMPLE_TASKS)
def test_rows_are_the_same_everywhere(task: str, made: dict[str, Rows]) -> None:
    assert made[task].fingerprint() == SHA256[task]


@pytest.mark.parametrize("task", SAMPLE_TASKS)
def test_fewer_rows_are_the_first_of_more_and_another_seed_or_name_gives_others(
    task: str, made: dict[str, Rows]
) -> None:
    known = get_task(task)
    assert synthetic_rows(known, WORDS, 40).texts == made[task].texts[:40]
    assert not set(synthetic_rows(known, WORDS, 40, seed=1).texts) & set(made[task].texts[:40])
    assert made["para"].texts[:40] != made["sts"].texts[:40]
    assert len(synthetic_rows(known, WORDS, 0)) == 0


@pytest.mark.parametrize("task", SAMPLE_TASKS)
def test_rows_have_the_columns_of_the_task_and_no_labels(task: str, made: dict[str, Rows]) -> None:
    rows = made[task]
    assert (len(rows), rows.labels, rows.where) == (COUNT, None, f"synthetic {task}")
    assert {len(texts) for texts in rows.texts} == {len(get_task(task).text)}
    assert all(text.split() for texts in rows.texts for text in texts)
    known = {word for text in (*SENTENCES, *WORDS) for word in text.split()}
    assert {word for texts in rows.texts for text in texts for word in text.split()} <= known, "texts, not their labels"


def test_any_task_gets_rows_of_the_whole_sample() -> None:
    weather = Task("weather", "classify", ("remark",), ("accuracy",), labels=("a", "b"))
    found = {texts[0] for texts in synthetic_rows(weather, WORDS, COUNT).texts}
    for task in SAMPLE_TASKS:
        assert found & {text for texts, _ in generate(task, "train") for text in texts}, task
    held_out = {text for task in SAMPLE_TASKS for texts, _ in generate(task, "dev") for text in texts} - SENTENCES
    assert held_out
    assert not found & held_out, "dev rows of the sample are for scoring"


def test_single_texts_are_of_three_kinds(made: dict[str, Rows]) -> None:
    texts = [row[0] for row in made["sst"].texts]
    rest = [text for text in texts if not random_words(text)]
    assert share([random_words(text) for text in texts]) == pytest.approx(0.4, abs=CLOSE)
    clean = [text for text in rest if not set(text.split()) & set(WORDS)]
    assert 1 / 3 * 0.6 < share([text in clean for text in texts]) < 1 / 3 * 0.6 + CLOSE  # some noise changes nothing
    one = [text in SENTENCES for text in clean]
    assert share(one) == pytest.approx(2 / 3, abs=0.07)
    ends = tuple(".?")
    for text in (text for text, single in zip(clean, one, strict=True) if not single):
        cuts = [at for at, letter in enumerate(text[:-1], start=1) if letter in ends]
        assert any(text[:cut] in SENTENCES and text[cut:].strip() in SENTENCES for cut in cuts), text


def test_pairs_are_of_three_kinds(made: dict[str, Rows]) -> None:
    known = {texts for texts in TRAIN if len(texts) == 2}
    rows = made["para"].texts
    assert share([row in known for row in rows]) == pytest.approx(0.5 / 3, abs=CLOSE)
    assert share([random_words(row[0]) and random_words(row[1]) for row in rows]) == pytest.approx(0.25, abs=CLOSE)
    copies = [row for row in rows if not random_words(row[0]) and len(row[0].split()) == len(row[1].split())]
    agreed = [share([a == b for a, b in zip(*(text.split() for text in row), strict=True)]) for row in copies]
    assert share([one > 0 for one in agreed]) > 0.25, "copies keep most words where they are"


def test_edited_copies_are_of_all_degrees_of_likeness(made: dict[str, Rows]) -> None:
    pairs = [(one.split(), two.split()) for one, two in made["sts"].texts if random_words(one) and random_words(two)]
    assert {len(one) for one, _ in pairs} == set(range(3, 28))
    assert all(1 <= len(two) <= len(one) for one, two in pairs)
    assert any(one == two for one, two in pairs)
    kept = [(Counter(one) & Counter(two)).total() / len(one) for one, two in pairs]
    for low in (0.0, 0.25, 0.5, 0.75):
        assert share([low <= one <= low + 0.25 for one in kept]) > 0.1
    rotated = [sorted(one) == sorted(two) and one != two for one, two in pairs]
    assert any(rotated)
    assert all(one[at:] + one[:at] == two for (one, two), moved in zip(pairs, rotated, strict=True) if moved
               for at in [next(at for at in range(len(one)) if one[at:] + one[:at] == two)])  # fmt: skip


def test_words_near_the_front_are_the_most_common(made: dict[str, Rows]) -> None:
    counts = Counter(word for (text,) in made["sst"].texts if random_words(text) for word in text.split())
    tenths = [sum(counts[word] for word in WORDS[start : start + 60]) for start in range(0, 600, 60)]
    assert tenths == sorted(tenths, reverse=True)
    weights = [sum(1 / (place + 20) for place in range(start, start + 60)) for start in range(0, 600, 60)]
    for found, weight in zip(tenths, weights, strict=True):
        assert found / sum(tenths) == pytest.approx(weight / sum(weights), abs=0.01)


def test_a_vocabulary_that_is_too_small_makes_way_for_the_words_of_the_sample(sst: Task) -> None:
    few = synthetic_rows(sst, WORDS[: FEWEST_WORDS - 1], 400)
    assert few == synthetic_rows(sst, [], 400)
    spoken = {word for text in SENTENCES for word in text.lower().rstrip(".?").replace(",", " ,").split()}
    assert {word for (text,) in few.texts for word in text.lower().replace(",", " ,").replace(".", "").replace(
        "?", "").split()} <= spoken  # fmt: skip
    enough = synthetic_rows(sst, WORDS[:FEWEST_WORDS], 400)
    assert set(WORDS[:FEWEST_WORDS]) <= {word for (text,) in enough.texts for word in text.split()}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", [SYNTHETIC, "invented"])  # the second is the earlier name
def test_they_are_no_rows_to_train_or_score_on(
    name: str, split: str, labelled: bool, sst: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"`data=synthetic`: texts that have no labels.* {split} rows of 'sst' are needed; .*; give `data=DIR`"
    with pytest.raises(DataError, match=message):
        load_rows(sst, split, name, labelled)
    assert not has_rows(sst, split, name)
    with pytest.raises(DataError, match="`data=synthetic`"):
        unlabelled_rows(sst, name, {})
