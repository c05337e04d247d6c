"""Python for practitioners: tables in, objects out, nothing on disk unless asked for, one line for a wrong argument."""

import builtins
import copy
import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mergekit_bert as mb
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import ENSEMBLE
from mergekit_bert.errors import ArgumentError, CompositionError, MissingExtraError, ModelFileError
from mergekit_bert.formats.file import write_model
from tests.adapters.helpers import random_adapter
from tests.composing.helpers import trio
from tests.tiny import tiny_rows

TONE = mb.Task(name="tone", kind="classify", text=("sentence",), labels=("poor", "good"), metrics=("accuracy",))
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "hold_out": 0.2, "precision": "fp32", "lr": 0.01, "rank": 2}


def frame(count: int) -> pd.DataFrame:
    """Rows of the tone task, which two words decide."""
    words = [("a fine film", "good"), ("not a fine plot", "poor"), ("very good", "good"), ("the bad film", "poor")]
    return pd.DataFrame([words[place % 4] for place in range(count)], columns=["sentence", "label"])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pair(bert: mb.Encoder) -> list[mb.Adapter]:
    """Adapters of two tasks, trained on tables."""
    rows = [(*texts, value) for texts, value in zip(*_sts(40), strict=True)]
    return [
        mb.Adapter.train(frame(40), task=TONE, base=bert, **QUICK),
        mb.Adapter.train(rows, task="sts", base=bert, **QUICK),
    ]


def _sts(count: int) -> tuple[tuple[tuple[str, ...], ...], tuple[Any, ...]]:
    rows = tiny_rows(mb.get_task("sts"), count)
    assert rows.labels is not None
    return rows.texts, rows.labels


def test_the_contract(pair: list[mb.Adapter], bert: mb.Encoder, here: Path) -> None:
    rows = [(*texts, value) for texts, value in zip(*_sts(40), strict=True)]
    other = mb.Adapter.train(rows, task="sts", base=bert, type="dora", head="matching", **QUICK)
    merged = mb.merge([pair[0], other], "ties", density=0.5)
    assert isinstance(merged, mb.Merged)
    assert merged.recipe["options"] == {"density": 0.5}
    (answer,) = merged.predict(["a fine film"], task="tone")  # type: ignore[misc]
    assert answer.label in TONE.labels
    assert answer.probability == answer.value
    assert repr(answer) == f"Prediction(label={answer.label!r}, probability={answer.value:.4f})"
    assert merged.predict("a fine film", task="tone") == answer
    assert isinstance(merged.predict(("a cat", "the cat"), task="sts"), mb.Prediction)
    found = merged.evaluate({"tone": frame(12)})
    table = found.to_dataframe()
    assert list(table[["task", "metric", "n"]].itertuples(index=False, name=None)) == [("tone", "accuracy", 12)]
    assert list(table["value"]) == [found.scores[0].value]
    assert "<td>accuracy</td>" in found._repr_html_()
    assert found.plot().axes
    assert list(here.iterdir()) == []
    merged.save("m.safetensors")
    loaded = mb.load("m.safetensors")
    assert isinstance(loaded, mb.Merged)
    assert loaded.predict(["a fine film"], "tone") == [answer]


def test_training_writes_where_it_is_told_alone(pair: list[mb.Adapter], bert: mb.Encoder, here: Path) -> None:
    assert list(here.iterdir()) == []
    made = mb.Adapter.train(frame(40), TONE, here / "a/tone.safetensors", base=bert, **QUICK)
    assert sorted(path.name for path in (here / "a").glob("*")) == [
        *("basis.json", "tone.run", "tone.safetensors"),
    ]
    made.save("again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("a/tone.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="`resume`: no `out`; expected `out`, which `resume` needs"):
        mb.train_adapter(TONE, frame(40), base=bert, resume=True)
    with pytest.raises(ArgumentError, match="`out` of finetune: nothing; expected a folder"):
        mb.finetune(TONE, frame(40), base=bert)


def test_adapters_without_a_file_keep_clear_of_each_other(pair: list[mb.Adapter]) -> None:
    first, second = (one.basis for one in pair)
    assert first is not None
    assert second is not None
    assert {*range(first.start, first.start + first.count)}.isdisjoint(range(second.start, second.start + second.count))
    assert isinstance(mb.merge(pair, "orthoada"), mb.Merged)


def test_options_of_a_training_are_those_of_its_records(bert: mb.Encoder) -> None:
    named = mb.train_adapter(TONE, frame(40), base=bert, alpha=8.0, **QUICK)
    records = mb.train_adapter(
        TONE,
        frame(40),
        base=bert,
        adapter=mb.AdapterConfig(rank=2, alpha=8.0),
        train=mb.TrainConfig(**{name: value for name, value in QUICK.items() if name != "rank"}),
    )
    assert named.config == records.config
    for site, tensors in named.tensors.items():
        assert all((tensors[name] == records.tensors[site][name]).all() for name in tensors)
    with pytest.raises(mb.MbertError, match=r"training option: 'epoch'.*did you mean 'epochs'"):
        mb.train_adapter(TONE, frame(40), base=bert, epoch=1)


@pytest.mark.parametrize("method", ["", "ties", ENSEMBLE])
def test_models_answer_alike_as_methods_and_as_functions(method: str, pair: list[mb.Adapter], bert: mb.Encoder) -> None:
    model = mb.merge(pair, method)
    texts = ["good film", "bad plot"]
    assert model.predict(texts, "tone") == mb.predict(model, texts, "tone", base=bert)
    assert model.predict(texts, "tone") == mb.predictor(model, base=bert).predict("tone", texts)
    assert model.predictor() is model.predictor()
    assert copy.deepcopy(model).predict(texts, "tone") == model.predict(texts, "tone")
    scores = model.evaluate({"tone": frame(8), "sts": [(*texts, value) for texts, value in zip(*_sts(8), strict=True)]})
    assert {score.task for score in scores.scores} == {"tone", "sts"}
    with pytest.raises(CompositionError, match=r"`task`: none, but the model has several; expected one of tone, sts"):
        model.predict(texts)


def test_an_adapter_needs_no_names(pair: list[mb.Adapter]) -> None:
    tone = pair[0]
    assert isinstance(tone.predict("good"), mb.Prediction)
    assert [one.n for one in tone.evaluate(frame(8)).scores] == [8]
    for wrong in (3, None, [3], {"text": ["a"]}, object()):
        with pytest.raises(mb.MbertError, match=r"^`texts`"):
            tone.predict(wrong)


def test_methods_that_read_rows_take_them_from_tables(pair: list[mb.Adapter], bert: mb.Encoder) -> None:
    pairs = list(_sts(8)[0])
    bare = mb.merge(pair, "regmean", data={"tone": frame(8), "sts": pairs}, base=bert)
    texts = mb.merge(pair, "regmean", texts={"tone": list(frame(8)["sentence"]), "sts": pairs}, base=bert)
    assert isinstance(bare, mb.Merged)
    assert isinstance(texts, mb.Merged)
    for site, delta in bare.deltas.items():
        assert (delta.dense() == texts.deltas[site].dense()).all()


def test_compare_and_doctor_take_tables(pair: list[mb.Adapter], bert: mb.Encoder, here: Path) -> None:
    sts = [(*texts, value) for texts, value in zip(*_sts(12), strict=True)]
    comparison = mb.compare(pair, ["fedavg", "ties"], ["full"], {"tone": frame(12), "sts": sts}, base=bert)
    assert list(comparison.to_dataframe()["merge"]) == [row.result.name for row in comparison.merges]
    diagnosis = mb.doctor(pair, {"tone": frame(12), "sts": sts}, methods=["fedavg"], rows=4, base=bert)
    assert list(diagnosis.to_dataframe()["of"]) == ["tone", "sts"]
    for result in (comparison, diagnosis):
        assert result.plot().axes
        assert result._repr_html_().count("<tr>") == len(result.records()) + 1
    assert list(here.iterdir()) == []


def test_what_is_shown_of_an_object_is_a_line(pair: list[mb.Adapter], bert: mb.Encoder) -> None:
    merged, ensemble = mb.merge(pair, "fedavg"), mb.merge(pair, "ensemble")
    shown = [repr(one) for one in (*pair, merged, ensemble, merged.evaluate({"tone": frame(8)}))]
    assert all(len(text) < 200 and "\n" not in text for text in shown)
    assert re.fullmatch(r"Adapter\(tone, lora of rank 2, base '\S+', \d+ sites, 0\.\d\d MiB\)", shown[0])
    assert re.fullmatch(r"Merged\(tone \+ sts, fedavg, base '\S+', \d+ sites, 0\.\d\d MiB\)", shown[2])
    lazy = mb.merge(pair, "fedavg", lazy=True)
    assert repr(lazy).startswith("Merged(tone + sts, fedavg, base")
    many = {f"t{number}": pair[0] for number in range(100)}
    assert len(repr(dataclasses.replace(ensemble, experts=many))) < 200  # type: ignore[type-var]


def test_a_table_needs_pandas_and_a_notebook_does_not(pair: list[mb.Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    found, real = pair[0].evaluate(frame(8)), builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"the package pandas is not installed; .*install mbert.pandas"):
        found.to_dataframe()
    assert "accuracy" in found._repr_html_()


LONG = "a" * 5000
WRONG: dict[str, tuple[Callable[[list[mb.Adapter]], object], str]] = {
    "load(0)": (lambda two: mb.load(0), "`path` of load: 0 .int.; expected a text or a path"),
    "load(long)": (lambda two: mb.load(LONG), "`path` of load: .*not too long for the file system"),
    "load(null)": (lambda two: mb.load("a\0b"), "`path` of load: .*without null characters"),
    "load()": (lambda two: mb.load(), "`path` of load: nothing"),
    "load(b=)": (lambda two: mb.load("a", b=1), "`b` of load: an argument that it does not take"),
    "evaluate(long)": (lambda two: mb.evaluate(two[0], LONG), "`data`: 'a+….*too long"),
    "evaluate(tasks)": (lambda two: mb.evaluate(two[0], tasks=1.5), "`tasks` of evaluate: 1.5 .float.; expected a"),
    "convert(to)": (lambda two: mb.convert("a", 1.5, "b"), "`to` of convert: 1.5 .float.; expected a text"),
    "convert(out)": (lambda two: mb.convert("a", "peft", []), r"`out` of convert: \[\] .list."),
    "merge(rank)": (lambda two: mb.merge(two, rank="x"), "`rank` of merge: 'x' .str.; expected a whole number"),
    "merge(rank, true)": (lambda two: mb.merge(two, rank=True), "`rank` of merge: True .bool."),
    "merge(rank, float)": (lambda two: mb.merge(two, rank=4.0), "`rank` of merge: 4.0 .float."),
    "merge(rank, 0)": (lambda two: mb.merge(two, "ties", rank=0), "`rank`: 0; expected a whole number from 1"),
    "merge(weights, nan)": (lambda two: mb.merge(two, weights=math.nan), "`weights` of merge: nan .*a mapping"),
    "merge(weights, pairs)": (lambda two: mb.merge(two, weights=[("sst", 2)]), "`weights` of merge: .*a mapping"),
    "merge(weights, text)": (lambda two: mb.merge(two, weights={"sst": "2"}), "`weights` of merge: '2' .*a number"),
    "merge(weights, true)": (lambda two: mb.merge(two, weights={"sst": True}), "`weights` of merge: True"),
    "merge(weights, inf)": (lambda two: mb.merge(two, weights={"sst": math.inf}), "`weights`: 'sst=inf'"),
    "merge(options)": (lambda two: mb.merge(two, options=b"x"), "`options` of merge: b'x' .*a mapping"),
    "merge(option)": (lambda two: mb.merge(two, "ties", density="much"), "option 'density' of ties: 'much'"),
    "merge(option, true)": (lambda two: mb.merge(two, "ties", density=True), "option 'density' of ties: True"),
    "merge(no option)": (lambda two: mb.merge(two, "ties", dense=1), "option of ties: 'dense'; .*mean 'density'"),
    "merge(layers)": (lambda two: mb.merge(two, layers={"a": 1}), "`layers` of merge: 1 .int.; expected a mapping"),
    "merge([None])": (lambda two: mb.merge([None]), "`inputs` of merge: None .*expected a text or a path or"),
    "merge([])": (lambda two: mb.merge([]), "merge: no adapters; expected at least one"),
    "merge(text)": (lambda two: mb.merge("a.safetensors"), "`inputs` of merge: .*; expected a list"),
    "merge(size)": (lambda two: mb.merge(two, size=b"x"), "`size` of merge: b'x'"),
    "merge(size, nan)": (lambda two: mb.merge(two, size=math.nan), "`size`: nan; expected a positive number"),
    "merge(texts)": (lambda two: mb.merge(two, texts=object()), "`texts` of merge: .*a mapping"),
    "merge(rows)": (lambda two: mb.merge(two, rows=-1), "`rows`: -1; expected a whole number of at least 1"),
    "merge(data)": (lambda two: mb.merge(two, data=3), "`data`: int; expected a folder, or tables by task"),
    "merge(method)": (lambda two: mb.merge(two, 3), "`method` of merge: 3 .int."),
    "merge(method, unknown)": (lambda two: mb.merge(two, "tise"), "merge method: 'tise'; .*did you mean 'ties'"),
    "save(set)": (lambda two: mb.save({1: 2}, "x.safetensors"), r"`model` of save: \{1: 2\} .dict."),
    "predictor(nan)": (lambda two: mb.predictor(math.nan), "`model` of predictor: nan"),
    "export(tasks)": (lambda two: mb.export(two[0], "x", tasks=None), "`tasks` of export: None"),
    "calibrate(steps)": (lambda two: mb.calibrate(mb.merge(two), steps=-1), "`steps` of calibrate: -1"),
    "calibrate(rows)": (lambda two: mb.calibrate(mb.merge(two), rows=[1]), r"`rows` of calibrate: \[1\]"),
    "changed_inputs": (lambda two: mb.changed_inputs(Path("nope"), [], []), "`files` of changed_inputs: .*a list"),
    "compare(limit)": (lambda two: mb.compare(two, limit=0), "`limit`: 0"),
    "doctor(methods)": (lambda two: mb.doctor(two, methods=3), "`methods` of doctor: 3"),
    "search(over)": (lambda two: mb.search(two, over="weights"), "`over` of search: 'weights' .str.; expected a list"),
    "train(data)": (lambda two: mb.Adapter.train(3, TONE), "`data`, tone: 3 .int.; expected a list of rows"),
    "train(task)": (lambda two: mb.Adapter.train(frame(8), 3), "`task` of train_adapter: 3"),
    "get_task": (lambda two: mb.get_task(3), "`name` of get_task: 3 .int."),
    "load_encoder": (lambda two: mb.load_encoder(3), "`name` of load_encoder: 3 .int."),
    "load_rows": (lambda two: mb.load_rows(TONE, "train", 3), "`data`, tone: 3 .int.; expected a list of rows"),
    "load_rows(split)": (lambda two: mb.load_rows(TONE, "test", "sample"), "split: 'test'; expected one of train, dev"),
    "load_rows(task)": (lambda two: mb.load_rows(3, "train"), "`task` of load_rows: 3 .int."),
    "describe": (lambda two: mb.describe(3), "`path` of describe: 3 .int."),
    "write_sample": (lambda two: mb.write_sample(3), "`folder` of write_sample: 3 .int."),
    "set_threads": (lambda two: mb.set_threads(2.5), "`count` of set_threads: 2.5 .float."),
    "set_threads(0)": (lambda two: mb.set_threads(0), "`count` of set_threads: 0; expected a whole number"),
    "Recipe": (lambda two: mb.Recipe(rank=True), "`rank` of Recipe: True .bool."),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_ends_in_one_line_that_names_it(case: str, bert: mb.Encoder) -> None:
    call, message = WRONG[case]
    with pytest.raises(mb.MbertError, match=f"^{message}") as caught:
        call(trio(bert)[:2])
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


RECORDS = """
import mergekit_bert as mb
for make in (
    lambda: mb.TrainConfig(epochs="x"),
    lambda: mb.TrainConfig(balance=1),
    lambda: mb.AdapterConfig(rank=2.0),
    lambda: mb.AdapterConfig(rank_pattern={"q": "2"}),
    lambda: mb.Recipe(weights=[("sst", 1)]),
    lambda: mb.Recipe(layers={"q": 1}),
    lambda: mb.Task("t", "classify", ("sentence", 3), ("f1",)),
    lambda: mb.Task(3, "classify", ("sentence",), ("f1",)),
):
    try:
        print("taken", make())
    except mb.MbertError as error:
        print(type(error).__name__, str(error).split("`")[1])
print(repr(mb.AdapterConfig(alpha=8).alpha), repr(mb.Recipe(weights={"sst": 2}).weights))
"""


def test_records_refuse_fields_of_another_type() -> None:
    done = subprocess.run([sys.executable, "-c", RECORDS], capture_output=True, text=True, check=True)
    *refused, taken = done.stdout.splitlines()
    names = ["epochs", "balance", "rank", "rank_pattern", "weights", "layers", "text", "name"]
    assert refused == [f"ArgumentError {name}" for name in names]
    assert taken == "8.0 {'sst': 2.0}"


def test_options_built_in_python_are_checked_as_those_of_files(bert: mb.Encoder) -> None:
    for name, wrong in (("options", {"density": 2.0}), ("options", {"density": None}), ("weights", {"other": 1.0})):
        recipe = mb.Recipe("ties", **{name: wrong})  # type: ignore[arg-type]
        with pytest.raises(CompositionError):
            mb.merge(trio(bert), recipe)


def test_what_a_recipe_says_holds_unless_something_is_said_beside_it(bert: mb.Encoder) -> None:
    recipe = mb.Recipe("ties", options={"density": 0.3}, rank=2)
    kept, changed = mb.merge(trio(bert), recipe), mb.merge(trio(bert), recipe, rank=3, density=0.4)
    assert isinstance(kept, mb.Merged)
    assert isinstance(changed, mb.Merged)
    assert (kept.recipe["options"], kept.recipe["rank"]) == ({"density": 0.3}, 2)
    assert (changed.recipe["options"], changed.recipe["rank"]) == ({"density": 0.4}, 3)


def test_no_option_of_a_method_hides_behind_a_parameter_unnoticed() -> None:
    hidden = {
        (method.name, field.name)
        for method in METHODS
        for field in dataclasses.fields(method.options)
        if field.name in mb.merge.__wrapped__.__annotations__  # type: ignore[attr-defined]
    }
    assert hidden == {("ctm", "rank"), ("distill", "layers")}  # as the docstring of merge says


@pytest.mark.parametrize("kind", ["adapter", "merged", "ensemble"])
def test_nothing_is_delivered_that_cannot_be_read_again(kind: str, bert: mb.Encoder, here: Path) -> None:
    model: Any = (
        random_adapter(bert) if kind == "adapter" else mb.merge(trio(bert), "fedavg" if kind == "merged" else ENSEMBLE)
    )
    bad = {
        "adapter": {"training": {"examples": "many"}},
        "merged": {"recipe": {"rank": True}},
        "ensemble": {"router": "guess"},
    }
    with pytest.raises(ModelFileError, match="broken metadata"):
        mb.save(dataclasses.replace(model, **bad[kind]), "m.safetensors")
    assert list(here.iterdir()) == []
    mb.save(model, "m.safetensors")
    write_model(Path("again.safetensors"), mb.load("m.safetensors"))  # type: ignore[arg-type]
    assert Path("m.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
