"""Prediction: routing, order, company, threads, and what the answers say."""

import dataclasses
import inspect
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters import patched
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold
from mergekit_bert.data import batches
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.errors import CompositionError, DataError, MbertWarning, ModelFileError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.prediction import Predictor, predict_table, predictions, the_task
from tests.adapters.helpers import random_adapter
from tests.composing.helpers import merge, trio
from tests.tiny import DISTINCT, WORDS, tiny_rows

TASKS = ("sst", "sts", "para")


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, train_bias=True)


def rows(task: str, count: int = 40) -> Rows:
    return tiny_rows(mb.get_task(task), count, seed=3)


@pytest.mark.parametrize("method", ["ensemble", "orthoada"])
@pytest.mark.parametrize("architecture", DISTINCT)
def test_a_row_does_not_depend_on_its_company(encoders: dict[str, mb.Encoder], architecture: str, method: str) -> None:
    encoder = encoders[architecture]
    predictor = Predictor(merge(trio(encoder), method), encoder)
    for task in TASKS:
        given = rows(task, 20)
        together = predictor.outputs(task, given)
        alone = np.concatenate([predictor.outputs(task, given.take([row])) for row in range(len(given))])
        np.testing.assert_allclose(together, alone, atol=1e-5 * max(1.0, float(np.abs(alone).max())))
        assert together.std(0).min() > 1e-4


def test_an_ensemble_answers_as_the_expert_alone_bit_for_bit(bert: mb.Encoder, three: list[Adapter]) -> None:
    together = Predictor(merge(three, "ensemble"), bert)
    for expert in three:
        alone = Predictor(expert, bert)
        for row in range(8):
            one = rows(expert.name, 8).take([row])
            assert np.array_equal(together.outputs(expert.name, one), alone.outputs(expert.name, one))
        many = rows(expert.name)
        assert np.array_equal(together.outputs(expert.name, many), alone.outputs(expert.name, many))


@pytest.mark.parametrize(("method", "count"), [("ensemble", 3), ("fedavg", 1)])
def test_deltas_are_folded_once_however_many_threads_ask(
    bert: mb.Encoder, three: list[Adapter], monkeypatch: pytest.MonkeyPatch, method: str, count: int
) -> None:
    folded: list[str] = []

    def counting(*args: Any) -> mb.Encoder:
        folded.extend(site for site in args[1].deltas if not site.startswith("pooler"))
        return fold(*args)

    monkeypatch.setattr(patched, "fold", counting)
    predictor, start = Predictor(merge(three, method), bert), threading.Barrier(8)

    def ask(place: int) -> None:
        start.wait()
        for task in TASKS:
            predictor.outputs(task, rows(task, 2))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    sites = [site for site in three[0].sites if not site.startswith("pooler")]
    assert sorted(folded) == sorted(count * sites), "what belongs to a head is folded apart"


@pytest.mark.parametrize("method", ["fedavg", "orthoada", "task_arithmetic"])
def test_a_merge_of_one_answers_as_the_adapter_alone(bert: mb.Encoder, three: list[Adapter], method: str) -> None:
    alone = Predictor(three[0], bert).outputs("sst", rows("sst"))
    found = Predictor(merge(three[:1], method, {"sst": 1.0}), bert).outputs("sst", rows("sst"))
    np.testing.assert_allclose(found, alone, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize("method", ["ensemble", "fedavg"])
def test_a_file_answers_as_the_model_in_memory(
    bert: mb.Encoder, three: list[Adapter], tmp_path: Path, method: str
) -> None:
    model = merge(three, method)
    write_model(tmp_path / "x", model)
    for task in TASKS:
        one = Predictor(model, bert).outputs(task, rows(task))
        two = Predictor(read_model(tmp_path / "x"), bert).outputs(task, rows(task))
        assert np.array_equal(one, two)


def test_a_merged_model_puts_all_deltas_under_each_head(bert: mb.Encoder, three: list[Adapter]) -> None:
    model = merge(three, "fedavg")
    for one in three:
        part = model.part(one.name)
        whole = classifier(fold(bert, part), one.task, one.head)
        given = rows(one.name, 6)
        inputs = bert.tokenizer(*[list(c) for c in zip(*given.texts, strict=True)], padding=True, return_tensors="pt")
        expected = whole(**inputs).detach().numpy() * (5 if one.name == "sts" else 1)
        np.testing.assert_allclose(Predictor(model, bert).outputs(one.name, given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ensemble", "fedavg"])
def test_answers_keep_the_order_of_the_texts(bert: mb.Encoder, three: list[Adapter], method: str) -> None:
    predictor = Predictor(merge(three, method), bert)
    texts = [" ".join(row) for row in rows("sst", 150).texts]
    answers = predictor.predict("sst", texts)
    turned = predictor.predict("sst", texts[::-1])[::-1]
    assert len({answer.outputs for answer in answers}) > 100
    for one, two in zip(answers, turned, strict=True):
        np.testing.assert_allclose(one.outputs, two.outputs, atol=1e-4)


LONG = " ".join(WORDS * 4)


def _answers(predictor: Predictor, mixed: Sequence[tuple[str, Rows]]) -> list[np.ndarray]:
    return [predictor.outputs(task, given) for task, given in mixed]


@pytest.mark.filterwarnings("ignore::mergekit_bert.errors.MbertWarning")
@pytest.mark.parametrize(
    ("architecture", "method"),
    [("bert", "ensemble"), ("bert", "fedavg"), ("deberta-v2", "ensemble"), ("modernbert", "ensemble")],
)
def test_eight_threads_get_the_answers_of_one(encoders: dict[str, mb.Encoder], architecture: str, method: str) -> None:
    encoder = encoders[architecture]
    lengths = (40, 9, 16)
    shorter = [dataclasses.replace(one, max_length=n) for one, n in zip(trio(encoder), lengths, strict=True)]
    model = merge(shorter, method)
    mixed = []
    for task in TASKS * 2:
        given = rows(task, 6)
        long = tuple((LONG,) * len(row) if place % 3 == 0 else row for place, row in enumerate(given.texts))
        mixed.append((task, dataclasses.replace(given, texts=long)))
    expected = _answers(Predictor(model, encoder), mixed)
    shared, start = Predictor(model, encoder), threading.Barrier(8)

    def work(offset: int) -> list[np.ndarray]:
        start.wait()
        return _answers(shared, mixed[offset:] + mixed[:offset])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for offset, answers in enumerate(found):
        for one, two in zip(answers, expected[offset:] + expected[:offset], strict=True):
            assert np.array_equal(one, two)


def test_rows_that_are_cut_are_counted_in_one_warning(bert: mb.Encoder, three: list[Adapter]) -> None:
    one = dataclasses.replace(three[0], max_length=9)
    predictor = Predictor(one, bert)
    texts = ["good film", LONG, "bad film", LONG, "a cat sees the dog and likes it"]
    with pytest.warns(MbertWarning) as told:
        answers = predictor.predict("sst", texts)
    assert [str(warning.message) for warning in told] == ["sst: 3 of 5 rows are longer than 9 tokens and are truncated"]
    cut = " ".join(LONG.split()[:7])
    np.testing.assert_allclose(answers[1].outputs, answers[3].outputs, atol=1e-5)
    np.testing.assert_allclose(answers[1].outputs, predictor.predict("sst", [cut])[0].outputs, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict("sst", ["good film"])


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("sst", [("good", "film")], "2 texts in a row; expected 1 for 'sst'; give sentence"),
        ("sts", ["good film"], "1 texts in a row; expected 2 for 'sts'; give sentence1 and sentence2"),
        ("para", [("a", "b"), ("a", "b", "c")], "3 texts in a row; expected 2 for 'para'"),
        ("sst", ["fine", ()], "0 texts in a row; expected 1"),
    ],
)
def test_a_wrong_number_of_texts_is_told(
    bert: mb.Encoder, three: list[Adapter], task: str, texts: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Predictor(merge(three, "ensemble"), bert).predict(task, texts)


predict, mixed = inspect.unwrap(Predictor.predict), inspect.unwrap(Predictor.mixed)
"""Without the type checks of the tests, as callers meet them."""

NO_LIST = "expected a list of texts, or of pairs of texts"
NO_TEXT = "expected a text, or a list of two"


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("sst", "abc", f"texts: 'abc' (str); {NO_LIST}"),
        ("sst", np.str_("abc"), f"texts: np.str_('abc') (str_); {NO_LIST}"),
        ("sst", None, f"texts: None (NoneType); {NO_LIST}"),
        ("sst", 3, f"texts: 3 (int); {NO_LIST}"),
        ("sst", np.array("abc"), "texts: array('abc', dtype='<U3') (ndarray); "),
        ("sst", b"abc", f"texts: b'abc' (bytes); {NO_LIST}"),
        ("sst", {"sentence": "good"}, "texts: {'sentence': 'good'} (dict); "),
        ("sst", {"good"}, "texts: {'good'} (set); "),
        ("sst", ["good", None], f"texts, row 2: None (NoneType); {NO_TEXT}"),
        ("sst", ["good", 1.5], f"texts, row 2: 1.5 (float); {NO_TEXT}"),
        ("sst", ["good", "bad", b"bad"], f"texts, row 3: b'bad' (bytes); {NO_TEXT}"),
        ("sst", [{"sentence": "good"}], "texts, row 1: {'sentence': 'good'} (dict); "),
        ("sst", ["good", ("good", "film")], "texts, row 2: 2 texts in a row; expected 1 for 'sst'"),
        ("sst", ["good", "\ud800"], "texts, row 2: no valid text ('\\ud800'); expected Unicode text"),
        ("sst", [["good"], [["good"]]], "texts, row 2: no valid text (['good']); expected Unicode text"),
        ("sst", [np.ones((3, 2))], "texts, row 1: no valid text (array([1., 1.])); "),
        ("sts", ["good"], "texts, row 1: 1 texts in a row; expected 2 for 'sts'"),
        ("sts", ("good", "bad"), "texts, row 1: 1 texts in a row; expected 2 for 'sts'"),
        ("sts", [("a", "b"), ("good",)], "texts, row 2: 1 texts in a row; expected 2 for 'sts'"),
        ("sts", [("a", "b"), ("good", None)], "texts, row 2: no valid text (None); expected Unicode text"),
        ("sts", [("a", "b"), ("good", b"bad")], "texts, row 2: no valid text (b'bad'); expected Unicode text"),
        (None, ["good"], "task: a task of type NoneType; expected a task's name, one of sst, sts, para"),
        (0, ["good"], "task: a task of type int; "),
        (["sst"], ["good"], "task: a task of type list; "),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_told_in_one_line(
    bert: mb.Encoder, three: list[Adapter], task: Any, texts: Any, message: str
) -> None:
    with pytest.raises(DataError) as told:
        predict(Predictor(merge(three, "ensemble"), bert), task, texts)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (None, "requests: None (NoneType); expected a list of (task, text or pair of texts)"),
        ("sst", "requests: 'sst' (str); "),
        (["ab"], "requests, row 1: 'ab' (str); expected (task, text or pair of texts)"),
        ([("sst", "good"), None], "requests, row 2: None (NoneType); "),
        ([("sst",)], "requests, row 1: 1 values; expected (task, text or pair of texts)"),
        ([("sts", "good", "bad")], "requests, row 1: 3 values; "),
        ([("sst", "good"), (["sst"], "good")], "requests, row 2: a task of type list; "),
        ([("sst", "good"), (None, "good")], "requests, row 2: a task of type NoneType; "),
        ([("sts", ("a", "b")), ("sst", "good"), ("sst", None)], "requests, row 3: None (NoneType); "),
        ([("sts", ("a", "b")), ("sst", "good"), ("sst", ("a", "b"))], "requests, row 3: 2 texts in a row; "),
        ([("sst", "good"), ("sts", "ab")], "requests, row 2: 1 texts in a row; expected 2 for 'sts'"),
        ([("sts", ("a", "b")), ("sst", "good"), ("sst", "\udc00")], "requests, row 3: no valid text ('\\udc00'); "),
    ],
    ids=repr,
)
def test_a_wrong_request_is_told_in_one_line(
    bert: mb.Encoder, three: list[Adapter], requests: Any, message: str
) -> None:
    with pytest.raises(DataError) as told:
        mixed(Predictor(merge(three, "ensemble"), bert), requests)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_any_iterable_of_rows_will_do(bert: mb.Encoder, three: list[Adapter]) -> None:
    predictor = Predictor(merge(three, "ensemble"), bert)
    texts, pairs = ["good film", "bad", ""], [("a cat", "the dog"), ("good", "bad")]
    expected = predictor.predict("sst", texts)
    assert predictor.predict("sst", iter(texts)) == expected
    assert predictor.predict("sst", np.array(texts)) == expected
    assert predictor.predict(np.str_("sst"), [[text] for text in texts]) == expected
    assert predictor.predict("sts", np.array(pairs)) == predictor.predict("sts", pairs)
    assert predictor.predict("sts", (iter(pair) for pair in pairs)) == predictor.predict("sts", pairs)
    requests = [("sts", pairs[0]), ("sst", texts[0])]
    assert predictor.mixed(iter(requests)) == predictor.mixed(requests)


def test_no_texts_give_no_answers(bert: mb.Encoder, three: list[Adapter]) -> None:
    assert Predictor(three[0], bert).predict("sst", []) == []


def test_an_unknown_task_is_told(bert: mb.Encoder, three: list[Adapter]) -> None:
    with pytest.raises(CompositionError, match="'cola'; expected one of sst"):
        Predictor(three[0], bert).predict("cola", ["good"])


def test_the_only_task_needs_no_name(three: list[Adapter]) -> None:
    assert the_task(three[0], None).name == "sst"
    assert the_task(merge(three, "ensemble"), "para").name == "para"
    with pytest.raises(CompositionError, match="expected one of sst, sts, para"):
        the_task(merge(three, "ensemble"), None)


def test_a_predictor_checks_its_encoder(three: list[Adapter], encoders: dict[str, mb.Encoder]) -> None:
    with pytest.raises(ModelFileError, match=r"x\.safetensors: made for base"):
        Predictor(three[0], encoders["electra"], "x.safetensors")
    with pytest.raises(ModelFileError, match="no encoder; expected the base"):
        Predictor(three[0])


def test_a_predictor_checks_its_parts(bert: mb.Encoder, three: list[Adapter]) -> None:
    headless = dataclasses.replace(three[1], head={})
    with pytest.raises(ModelFileError, match="x, task 'sts': no head classifier"):
        Predictor(merge([three[0], headless], "ensemble"), bert, "x")


def test_a_classification_answers_with_label_name_and_probability(sst: mb.Task) -> None:
    outputs = np.log(np.array([[0.1, 0.2, 0.4, 0.2, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]])) + np.array([[1000.0], [-1000.0]])
    one, two = predictions(sst, outputs)
    assert (one.label, one.name, two.label, two.name) == ("2", "neutral", "0", "very negative")
    assert (one.value, two.value) == (pytest.approx(0.4), pytest.approx(0.6))
    assert one.outputs == pytest.approx(tuple(outputs[0]))


def test_probabilities_of_the_largest_outputs_are_finite_and_add_up(sst: mb.Task) -> None:
    largest = float(np.finfo(np.float32).max)
    outputs = np.array([[largest, -largest, 0, 0, 0], [largest] * 5, [-largest] * 5], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert [answer.value for answer in predictions(sst, outputs)] == [1, pytest.approx(0.2), pytest.approx(0.2)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", ["sst", "sts"])
def test_an_output_that_is_not_finite_is_no_prediction(task: str, value: float) -> None:
    outputs = np.zeros((4, mb.get_task(task).outputs), dtype=np.float32)
    outputs[2, -1] = value
    with pytest.raises(ModelFileError, match=f"x, task '{task}': outputs that are not finite for 1 of 4 rows; "):
        predictions(mb.get_task(task), outputs, "x")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_that_overflows_is_named(bert: mb.Encoder, three: list[Adapter]) -> None:
    head = {name: torch.full_like(tensor, torch.finfo(tensor.dtype).max) for name, tensor in three[0].head.items()}
    model = merge([dataclasses.replace(three[0], head=head), three[1]], "ensemble")
    predictor = Predictor(model, bert, "x.safetensors")
    message = "x.safetensors, task 'sst': outputs that are not finite for 1 of 1 rows"
    with pytest.raises(ModelFileError, match=message):
        predictor.predict("sst", ["good"])
    with pytest.raises(ModelFileError, match=message):
        predictor.mixed([("sts", ("a", "b")), ("sst", "good")])
    with pytest.raises(ModelFileError, match=message):
        predict_table(predictor, mb.get_task("sst"), Rows((("good",),), None, "texts"))


def test_a_regression_stays_in_its_range_while_its_outputs_may_not(sts: mb.Task) -> None:
    answers = predictions(sts, np.array([[-1.5], [0.0], [2.34567], [5.0], [7.25]]))
    assert [answer.value for answer in answers] == [0, 0, 2.34567, 5, 5]
    assert [answer.outputs[0] for answer in answers] == [-1.5, 0, 2.34567, 5, 7.25]
    assert [answer.label for answer in answers] == ["0.0000", "0.0000", "2.3457", "5.0000", "5.0000"]


def test_a_wild_regression_is_kept_in_range(bert: mb.Encoder) -> None:
    wild = random_adapter(bert, "sts", spread=2.0)
    given = rows("sts", 60)
    predictor = Predictor(wild, bert)
    outputs = predictor.outputs("sts", given)[:, 0]
    values = [answer.value for answer in predictor.predict("sts", given.texts)]
    assert outputs.min() < 0 or outputs.max() > 5
    np.testing.assert_allclose(values, np.clip(outputs, 0, 5))


def test_ticks_count_the_rows(bert: mb.Encoder, three: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKEN_BUDGET", 100)
    ticks: list[int] = []
    Predictor(three[0], bert).outputs("sst", rows("sst", 70), ticks.append)
    assert len(ticks) > 3
    assert (ticks, ticks[-1]) == (sorted(set(ticks)), 70)


@pytest.mark.parametrize(
    ("task", "header", "columns"),
    [
        ("sst", ["sentence", "prediction", "name", "probability"], 4),
        ("sts", ["sentence1", "sentence2", "prediction"], 3),
    ],
)
def test_the_table_of_answers(
    bert: mb.Encoder, three: list[Adapter], task: str, header: list[str], columns: int
) -> None:
    predictor = Predictor(merge(three, "ensemble"), bert)
    given = rows(task, 5)
    lines = [line.split("\t") for line in predict_table(predictor, mb.get_task(task), given).splitlines()]
    answers = predictor.predict(task, given.texts)
    assert lines[0] == header
    assert {len(line) for line in lines} == {columns}
    for line, texts, answer in zip(lines[1:], given.texts, answers, strict=True):
        assert line[: len(texts)] == list(texts)
        assert line[len(texts) : len(texts) + 2] == [answer.label, answer.name][: columns - len(texts)]


def test_a_tab_in_a_text_is_quoted(bert: mb.Encoder, three: list[Adapter]) -> None:
    table = predict_table(Predictor(three[0], bert), three[0].task, Rows((("good\tfilm",),), None, "texts"))
    assert table.splitlines()[1].startswith('"good\tfilm"\t')
