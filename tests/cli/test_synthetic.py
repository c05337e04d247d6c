"""Merges on synthetic texts: what they read, from Python and from the command line, and who refuses them."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.composing.calibration import calibrate_scales
from mergekit_bert.composing.merging import MergeContext, merge_inputs_of
from mergekit_bert.composing.merging import merge as compose
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows, read_texts
from mergekit_bert.data.source import SYNTHETIC
from mergekit_bert.data.synthetic import synthetic_rows
from mergekit_bert.encoder.words import whole_words
from mergekit_bert.errors import DataError
from mergekit_bert.evaluation import sources
from mergekit_bert.models.composition import Merged
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert, unchanged
from tests.corpus import write_corpus

TASKS = ("sst", "para")
QUICK = {"steps": 2, "precision": "fp32"}
METHODS: dict[str, dict[str, object]] = {"distill": QUICK, "adamerging": {"steps": 2}, "regmean": {}}


@pytest.fixture(scope="module")
def adapters(bert: mb.Encoder) -> list[mb.Adapter]:
    return [random_adapter(bert, task, start=4 * place) for place, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def home(adapters: list[mb.Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for one in adapters:
        mb.save(one, folder / f"adapters/{one.name}.safetensors")
    write_corpus(folder / "data", TASKS, train=20, dev=6)
    (folder / "sst.txt").write_text("a good film\na bad plot\nthe man likes the dog\n")
    return folder


def rows_of(bert: mb.Encoder, count: int) -> dict[str, Rows]:
    return {task: synthetic_rows(mb.get_task(task), whole_words(bert.tokenizer), count) for task in TASKS}


def saved(model: object, path: Path) -> bytes:
    assert isinstance(model, Merged)
    mb.save(model, path, force=True)
    return path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_reads_synthetic_rows_of_each_task(
    method: str, adapters: list[mb.Adapter], bert: mb.Encoder, tmp_path: Path
) -> None:
    recipe = Recipe(method, options=METHODS[method])
    found = saved(mb.merge(adapters, recipe, data=SYNTHETIC, rows=12, base=bert), tmp_path / "m.safetensors")
    for count in (12, 11):
        given = MergeContext(lambda: bert, rows_of(bert, count).__getitem__)
        same = saved(compose(adapters, recipe, given), tmp_path / "m.safetensors")
        assert (same == found) == (count == 12)


def test_the_trace_keeps_their_fingerprints_and_the_method_its_number(
    adapters: list[mb.Adapter], bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = mb.merge(adapters, "distill", options=QUICK, data=SYNTHETIC, rows=12, base=bert)
    assert isinstance(merged, Merged)
    expected = {task: rows.fingerprint() for task, rows in rows_of(bert, 12).items()}
    assert merged.trace["learned"]["fingerprints"] == expected
    counts: list[int] = []

    def few_rows(task: mb.Task, words: Sequence[str], count: int) -> Rows:
        counts.append(count)
        return synthetic_rows(task, words, 5)

    monkeypatch.setattr(sources, "synthetic_rows", few_rows)
    mb.merge(adapters, "regmean", data=SYNTHETIC, base=bert)
    assert counts == [256, 256]


def test_plain_texts_come_before_them(adapters: list[mb.Adapter], bert: mb.Encoder, home: Path, tmp_path: Path) -> None:
    recipe, path = Recipe("regmean"), home / "sst.txt"
    found = saved(
        mb.merge(adapters, recipe, data=SYNTHETIC, texts={"sst": path}, rows=12, base=bert), tmp_path / "m.safetensors"
    )
    rows = {**rows_of(bert, 12), "sst": read_texts(path, mb.get_task("sst"))}
    assert (
        saved(compose(adapters, recipe, MergeContext(lambda: bert, rows.__getitem__)), tmp_path / "m.safetensors")
        == found
    )


def test_scales_are_calibrated_on_them(adapters: list[mb.Adapter], bert: mb.Encoder) -> None:
    merged = mb.merge(adapters, "ties", base=bert)
    assert isinstance(merged, Merged)
    found = mb.calibrate(merged, SYNTHETIC, steps=["scales"], rows=12, inputs=adapters, base=bert)
    expected = calibrate_scales(merged, merge_inputs_of(adapters), bert, rows_of(bert, 12))
    assert found.trace == expected.trace
    with pytest.raises(DataError, match="`data=synthetic`: texts that have no labels"):
        mb.calibrate(merged, SYNTHETIC, steps=["heads"], base=bert)


def test_the_doctor_takes_them(home: Path, bert: mb.Encoder, adapters: list[mb.Adapter]) -> None:
    given = MergeContext(lambda: bert, rows_of(bert, 8).__getitem__)
    found = mb.doctor(adapters, SYNTHETIC, methods=["fedavg"], rows=8, base=bert, folder=home / "adapters")
    expected = api.measure_pairs(merge_inputs_of(adapters), given, None)
    answers = found.report.matrices["answers"]
    assert answers.any()
    assert np.array_equal(answers, expected.matrices["answers"])


def test_the_command_line_merges_and_diagnoses_without_data(home: Path) -> None:
    words = ("--set", "steps=1", "--set", "precision=fp32", "--rows", "8", "--data", SYNTHETIC)
    done = mbert("merge", *words, "--out", "plain.safetensors", here=home)
    assert done.code == 0, done.err
    assert "chosen: distill" in done.out
    scaled = ("--method", "distill", "--calibrate", "scales", "--calibrate-rows", "8", "--out", "scaled.safetensors")
    done = mbert("merge", *words, *scaled, here=home)
    assert done.code == 0, done.err
    assert "distill + scales" in done.out
    done = mbert("doctor", "--methods", "fedavg", "--rows", "4", "--data", SYNTHETIC, here=home)
    assert done.code == 0, done.err


REFUSED: dict[str, tuple[str, ...]] = {
    "train-adapter": ("train-adapter", "--task", "sst", "--out", "new.safetensors"),
    "eval": ("eval", "adapters/sst.safetensors"),
    "compare": ("compare", "--methods", "fedavg", "--out", "new"),
    "search": ("merge", "--method", "ties", "--search", "2", "--out", "new.safetensors"),
    "heads": ("merge", "--method", "distill", "--calibrate", "scales,heads", "--out", "new.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_labels_refuses_them(case: str, home: Path, tiny_folders: dict[str, Path]) -> None:
    base = ("--base", str(tiny_folders["bert"])) if case == "train-adapter" else ()
    with unchanged(home):
        done = mbert(*REFUSED[case], *base, "--data", SYNTHETIC, here=home)
    assert done.code == 1
    message = (
        r"error: --data synthetic: texts that have no labels, .*; expected a folder that holds "
        r"\w+/(train|dev).tsv; give --data DIR .*\n"
    )
    assert re.fullmatch(message, done.err), done.err
