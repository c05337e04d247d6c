"""Rows for merges: no label is read or needed, plain text gives what a table gives, and idle options are told."""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.errors import CompositionError, DataError, MbertWarning, UnknownNameError
from mergekit_bert.models.composition import Merged
from tests.adapters.helpers import random_adapter
from tests.cli.command import Done, mbert, unchanged
from tests.corpus import read_tsv, write_corpus

TASKS = ("sst", "sts")
TEXTS = ("--texts", "sst=sst.txt", "--texts", "sts=pairs.tsv")
METHODS: dict[str, tuple[str, ...]] = {
    "distill": ("--set", "steps=2", "--set", "precision=fp32"),
    "adamerging": ("--set", "steps=2"),
    "regmean": (),
    "fisher": (),
    "nsc": (),
    "fedavg": ("--calibrate", "scales", "--calibrate-rows", "8"),
}


@pytest.fixture(scope="module")
def home(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two tasks, and the same rows with labels, with wrong ones, without, and as plain text."""
    folder, base = tmp_path_factory.mktemp("home"), mb.load_encoder(tiny_folders["bert"])
    for place, task in enumerate(TASKS):
        mb.save(random_adapter(base, task, start=4 * place), folder / f"adapters/{task}.safetensors")
    write_corpus(folder / "data", TASKS, train=20, dev=6)
    for task in TASKS:
        rows, columns = read_tsv(folder / f"data/{task}/train.tsv"), mb.get_task(task).text
        for name, label in (("poisoned", "poison"), ("absent", None)):
            lines = [[row[one] for one in columns] + ([label] if label else []) for row in rows]
            header = [*columns, *(["label"] if label else [])]
            (folder / name / task).mkdir(parents=True)
            text = "".join("\t".join(line) + "\n" for line in [header, *lines])
            (folder / name / task / "train.tsv").write_text(text)
        plain = ["\t".join(row[one] for one in columns) for row in rows]
        (folder / ("sst.txt" if task == "sst" else "pairs.tsv")).write_text("\n\n".join(plain))
    (folder / "half/sts").mkdir(parents=True)
    shutil.copy(folder / "absent/sts/train.tsv", folder / "half/sts/train.tsv")
    (folder / "bad.txt").write_text("a\tb\n")
    return folder


def merge(home: Path, *words: str, out: str = "m.safetensors") -> Done:
    (home / out).unlink(missing_ok=True)
    shutil.rmtree(home / "m.run", ignore_errors=True)
    return mbert("merge", *words, "--out", out, here=home)


@pytest.mark.parametrize("method", METHODS)
def test_labels_and_the_form_of_the_rows_do_not_count(home: Path, method: str) -> None:
    common = ("--method", method, *METHODS[method], *(() if method == "fedavg" else ("--rows", "8")))
    made = {}
    for name, words in {
        "labelled": ("--data", "data"),
        "poisoned": ("--data", "poisoned"),
        "absent": ("--data", "absent"),
        "plain": TEXTS,
        "mixed": ("--data", "half", "--texts", "sst=sst.txt"),
        "both": ("--data", "poisoned", *TEXTS),
    }.items():
        done = merge(home, *common, *words)
        assert done.code == 0, (name, done.err)
        made[name] = (home / "m.safetensors").read_bytes()
    for name, found in made.items():
        assert found == made["labelled"], name
    fewer = [word if word != "8" else "7" for word in common]
    assert merge(home, *fewer, *TEXTS).code == 0
    assert (home / "m.safetensors").read_bytes() != made["labelled"], "so many rows are taken as were asked for"


def test_plain_texts_are_rows_for_the_recommendation_and_lie_nowhere_in_the_file(home: Path) -> None:
    words = ("--set", "steps=1", "--set", "precision=fp32", "--save-recipe", "r.yml", "--force", *TEXTS)
    done = merge(home, *words)
    assert done.code == 0, done.err
    assert "chosen: distill, since there are unlabelled rows" in done.out
    for word in (b"sst.txt", b"pairs.tsv"):
        assert word not in (home / "m.safetensors").read_bytes() + (home / "r.yml").read_bytes()
    before = (home / "m.safetensors").read_bytes()
    assert merge(home, "--recipe", "r.yml", *TEXTS).code == 0
    assert (home / "m.safetensors").read_bytes() == before


RECOMMENDED: dict[str, tuple[tuple[str, ...], str]] = {
    "heads": (("--calibrate", "heads", "--data", "data"), "chosen: distill, since there are unlabelled rows"),
    "scales": (("--calibrate", "scales", *TEXTS), "chosen: distill, since there are unlabelled rows"),
    "search": (("--search", "1", "--data", "data"), "chosen: pico, since a search needs a method that does not learn"),
    "nothing": ((), "chosen: pico, since there are no rows"),
}


@pytest.mark.parametrize("case", RECOMMENDED)
def test_the_recommendation_tells_what_is_there(home: Path, case: str) -> None:
    words, told = RECOMMENDED[case]
    quick = ("--set", "steps=1", "--set", "precision=fp32") if "distill" in told else ()
    done = merge(home, *words, *quick)
    assert done.code == 0, done.err
    assert told in done.out


@pytest.mark.parametrize("step", ["heads", "scales"])
def test_rows_are_those_of_a_calibration_where_the_method_reads_none(home: Path, step: str) -> None:
    common = ("--method", "ties", "--calibrate", step, "--data", "data")
    for words in (("--rows", "12"), ("--calibrate-rows", "12"), ("--calibrate-rows", "11")):
        done = merge(home, *common, *words, out=f"{''.join(words)}.safetensors")
        assert done.code == 0, done.err
    one, two, other = (
        (home / f"{name}.safetensors").read_bytes() for name in ("--rows12", "--calibrate-rows12", "--calibrate-rows11")
    )
    assert one == two != other


def test_a_method_and_a_calibration_take_as_many_rows_as_each_is_told(home: Path) -> None:
    done = merge(home, *DISTILL, "--data", "data", "--rows", "9", "--calibrate", "heads", "--calibrate-rows", "12")
    assert done.code == 0, done.err
    model = mb.load(home / "m.safetensors")
    assert isinstance(model, Merged)
    assert model.trace["learned"]["rows"] == {"sst": 9, "sts": 9}
    assert {one["count"] for one in model.trace["calibrated"]["heads"]["rows"].values()} == {12}


def test_plain_texts_from_python(home: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    files = [f"adapters/{task}.safetensors" for task in TASKS]
    texts: dict[str, str | Path] = {"sst": "sst.txt", "sts": Path("pairs.tsv")}
    by_texts = mb.merge(files, "regmean", texts=texts, rows=8, base=bert)
    by_data = mb.merge(files, "regmean", data="absent", rows=8, base=bert)
    assert isinstance(by_texts, Merged)
    mb.save(by_texts, "one.safetensors", force=True)
    mb.save(by_data, "two.safetensors", force=True)
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    with pytest.raises(
        UnknownNameError, match=r"task of `texts`: 'stss'; expected one of sst, sts; did you mean 'sts'"
    ):
        mb.merge(files, "regmean", texts={"stss": "pairs.tsv"}, base=bert)
    with pytest.raises(DataError, match=r"task 'sts': none; .*`data=DIR`.*`texts=sts=FILE`"):
        mb.merge(files, "regmean", texts={"sst": "sst.txt"}, base=bert)
    with pytest.raises(CompositionError, match="unlabelled rows of every task"):
        mb.merge(files, "distill", base=bert)


def test_a_merge_with_its_calibration_is_one_call(home: Path, bert: mb.Encoder) -> None:
    files = [home / f"adapters/{task}.safetensors" for task in TASKS]
    steps, data = ["scales", "heads"], home / "data"
    inputs = mb.merge(files, "ties", base=bert)
    assert isinstance(inputs, Merged)
    known = "no record of whether the training"
    with pytest.warns(MbertWarning, match=known):
        at_once = mb.merge(files, "ties", data=data, calibrate=steps, calibrate_rows=12, base=bert)
    with pytest.warns(MbertWarning, match=known):
        after = mb.calibrate(inputs, data, steps=steps, rows=12, inputs=files, base=bert)
    mb.save(at_once, home / "one.safetensors", force=True)
    mb.save(after, home / "two.safetensors", force=True)
    assert (home / "one.safetensors").read_bytes() == (home / "two.safetensors").read_bytes()


DISTILL = ("--method", "distill", *METHODS["distill"])
UNREAD: dict[str, tuple[tuple[str, ...], str]] = {
    "folder": (
        ("--method", "ties", "--data", "data"),
        "--data data: ties reads no rows .*; .* and by --search or --calibrate",
    ),
    "no such folder": (("--method", "ties", "--data", "nowhere"), "--data nowhere: ties reads no rows here"),
    "synthetic": (
        ("--method", "ties", "--data", "synthetic"),
        "--data synthetic: ties reads no rows .* and by --calibrate scales",
    ),
    "an ensemble": (("--method", "ensemble", "--data", "data"), "--data data: ensemble reads no rows here"),
    "a recipe": (("--recipe", "pico.yml", "--data", "data"), "--data data: pico reads no rows here, "),
}


@pytest.mark.parametrize("case", UNREAD)
def test_data_that_nothing_reads_is_noted_and_changes_nothing(home: Path, case: str) -> None:
    (home / "pico.yml").write_text("method: pico\n")
    words, told = UNREAD[case]
    done = merge(home, *words)
    assert done.code == 0, done.err
    assert re.fullmatch(rf"note: {told}.*\n", done.err), done.err
    with_data = (home / "m.safetensors").read_bytes()
    done = merge(home, *words[:-2])
    assert (done.code, done.err) == (0, "")
    assert (home / "m.safetensors").read_bytes() == with_data


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "regmean"),
        ("--method", "ties", "--search", "1"),
        ("--method", "ties", "--calibrate", "scales"),
        ("--set", "steps=1", "--set", "precision=fp32"),
    ],
    ids=["a method", "a search", "a calibration", "the recommended"],
)
def test_data_that_something_reads_is_not_noted(home: Path, words: tuple[str, ...]) -> None:
    done = merge(home, *words, "--data", "data")
    assert done.code == 0, done.err
    assert "reads no rows" not in done.err


@pytest.mark.parametrize("words", [(), ("--data", "data", "--set", "steps=1", "--set", "precision=fp32")])
def test_no_evidence_is_cited_for_a_single_input(home: Path, words: tuple[str, ...]) -> None:
    done = merge(home, "adapters/sst.safetensors", *words)
    assert done.code == 0, done.err
    method = "distill" if words else "pico"
    assert f"chosen: {method}, but a single input is not merged with anything\n" in done.out


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "heads without labels": (
        (*DISTILL, "--data", "absent", "--calibrate", "heads"),
        r"absent/sst/train.tsv: no column 'label' \(found: sentence\); expected columns sentence, label; ",
    ),
    "heads of plain text": (
        (*DISTILL, *TEXTS, "--data", "poisoned", "--calibrate", "scales,heads"),
        r"poisoned/sst/train.tsv, line 2: label 'poison'",
    ),
    "search without labels": (
        ("--method", "ties", "--data", "absent", "--search", "2"),
        r"absent/sst/train.tsv: no column 'label'",
    ),
    "a task without rows": ((*DISTILL, "--texts", "sst=sst.txt"), r"'sts': none; .*--data DIR, or --texts sts=FILE"),
    "a task without rows in the folder": (
        (*DISTILL, "--data", "half", "--texts", "sts=pairs.tsv"),
        r"'sst': none in half; .*--data DIR, or --texts sst=FILE",
    ),
    "no rows at all": (DISTILL, r"rows of sst, sts missing; expected unlabelled rows .*\(--data or --texts;"),
    "a line with a tab": ((*DISTILL, *TEXTS[2:], "--texts", "sst=bad.txt"), r"bad.txt, line 1: 2 texts .* expected 1 "),
    "a file that is not there": ((*DISTILL, *TEXTS[2:], "--texts", "sst=none"), r"none: no such file"),
    "an unknown task": (
        (*DISTILL, *TEXTS, "--texts", "para=x"),
        r"task of --texts: 'para'; expected one of sst, sts; ",
    ),
    "an unknown task to calibrate": (
        ("--method", "ties", "--calibrate", "scales", *TEXTS, "--texts", "para=x"),
        r"task of --texts: 'para'; expected one of sst, sts; ",
    ),
    "no file": ((*DISTILL, "--texts", "sst"), r"--texts: 'sst'; expected TASK=FILE, each task once"),
    "a task twice": ((*DISTILL, *TEXTS, "--texts", "sst=b"), r"--texts: 'sst=b'; expected TASK=FILE, each task once"),
    "kinds of no search": (("--search-over", "weights"), r"--search-over: no --search, .*; expected --search; "),
    "rows of no search": (("--search-rows", "300"), r"--search-rows: no --search, .*; expected --search; "),
    "rows of no calibration": (
        ("--search", "2", "--calibrate-rows", "9", "--data", "data"),
        r"--calibrate-rows: no --calibrate, .*; expected --calibrate; ",
    ),
    "texts for nobody": (("--method", "ties", *TEXTS), r"--texts: ties reads no rows here; "),
    "texts for an ensemble": (("--method", "ensemble", *TEXTS), r"--texts: ensemble reads no rows here; "),
    "rows for nobody": (
        ("--method", "ties", "--data", "data", "--rows", "9"),
        r"--rows: ties reads no rows ",
    ),
    "rows for the recommended": (("--rows", "9"), r"--rows: pico reads no rows here; "),
    "rows twice for a calibration": (
        ("--method", "ties", "--calibrate", "scales", "--data", "data", "--rows", "9", "--calibrate-rows", "9"),
        r"--rows: ties reads no rows here; ",
    ),
    "rows for a method or a calibration": (
        (*DISTILL, "--calibrate", "heads", "--data", "data", "--rows", "9"),
        r"--rows: .* those that distill reads, or .*; expected --rows together with --calibrate-rows; "
        r"add --calibrate-rows N",
    ),
    "rows for a method or a calibration of a search": (
        ("--method", "regmean", "--search", "2", "--calibrate", "scales", *TEXTS, "--rows", "9"),
        r"--rows: .* those that regmean reads, or .*; add --calibrate-rows N",
    ),
    "rows for a search": (
        ("--method", "ties", "--search", "2", "--data", "data", "--rows", "9"),
        r"--rows: ties reads no rows here; .*; give --search-rows ",
    ),
    "texts for heads": (
        ("--method", "ties", "--calibrate", "heads", "--data", "data", *TEXTS),
        r"--texts: ties reads no rows here; ",
    ),
    "an unknown method": (("--method", "distil", *TEXTS), r"merge method: 'distil'; .*did you mean 'distill'\?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_or_has_no_effect_is_told_before_any_work(
    home: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = REFUSED[case]

    def work(*_: object, **__: object) -> None:
        pytest.fail("it was tried")

    monkeypatch.setattr("mergekit_bert.composing.merging.merged_sites", work)
    monkeypatch.setattr("mergekit_bert.request.search", work)
    with unchanged(home):
        done = mbert("merge", *words, "--out", "new.safetensors", here=home)
    assert done.code == 1
    assert re.fullmatch(r"error: \S.*; expected .*; .*\n", done.err), done.err
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize("words", [("--rows", "9"), TEXTS], ids=["rows", "texts"])
def test_files_that_hold_what_a_method_needs_need_no_rows(home: Path, words: Sequence[str], bert: mb.Encoder) -> None:
    for place, task in enumerate(TASKS):
        one = random_adapter(bert, task, start=4 * place)
        rows = mb.load_rows(one.task, "train", home / "data")
        grams = collect("gram", bert, [one.part(task)], [rows])
        made = dataclasses.replace(one, statistics={"gram": grams})
        mb.save(made, home / f"grams/{task}.safetensors", force=True)
    files = [f"grams/{task}.safetensors" for task in TASKS]
    done = merge(home, *files, "--method", "regmean", *words)
    assert (done.code, "regmean reads no rows here" in done.err) == (1, True)
    assert merge(home, *files[:1], "adapters/sts.safetensors", "--method", "regmean", *TEXTS, "--rows", "9").code == 0
