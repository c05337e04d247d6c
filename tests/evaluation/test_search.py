"""Search: never worse than its start, the same after a kill, and no figure on the rows that it was chosen by."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.delta import LowRank
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.composing import merging
from mergekit_bert.composing.merge_input import MergeInput, inputs_of
from mergekit_bert.composing.merging import merge_inputs_of
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.methods import ties
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, MbertWarning, UnknownNameError
from mergekit_bert.evaluation import search as module
from mergekit_bert.evaluation.evaluate import evaluate_model
from mergekit_bert.evaluation.scores import score_task
from mergekit_bert.evaluation.search import find_axes, layer_groups, overall, recipe_at, search
from mergekit_bert.models.composition import Merged
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter, same_tensors
from tests.cli.command import mbert
from tests.composing.helpers import given, merged, trio
from tests.corpus import write_corpus
from tests.evaluation.helpers import other_ties, seen
from tests.tiny import tiny_rows

NAMES = ("sst", "sts", "para")


@pytest.fixture(scope="module")
def inputs(bert: Encoder) -> list[MergeInput]:
    return merge_inputs_of(trio(bert))


@pytest.fixture(scope="module")
def tasks() -> dict[str, tuple[Task, Rows]]:
    return {name: (get_task(name), tiny_rows(get_task(name), 20)) for name in NAMES}


def scores(model: Merged) -> list[float]:
    return [one["score"] for one in model.trace["search"]["evaluations"]]


def same(one: Merged, two: Merged) -> bool:
    left = {site: delta.dense() for site, delta in one.deltas.items()}
    return one.trace == two.trace and same_tensors(left, {site: delta.dense() for site, delta in two.deltas.items()})


@pytest.mark.parametrize("over", [("weights",), ("weights", "layers", "options")])
def test_the_best_is_no_worse_than_the_start_and_is_what_the_trace_says(
    bert: Encoder, inputs: list[MergeInput], tasks: dict[str, tuple[Task, Rows]], over: tuple[str, ...]
) -> None:
    found = search(inputs, Recipe("ties"), tasks, bert, 5, over)
    told = found.trace["search"]
    assert len(told["evaluations"]) == 5
    assert scores(found)[0] == overall(merged([one.adapter for one in inputs], "ties"), bert, tasks)
    assert scores(found)[told["best"]] == max(scores(found)) == overall(found, bert, tasks)
    assert len(set(scores(found))) > 1
    assert all(set(one) == {*over, "score"} for one in told["evaluations"])
    again = mb.merge([one.adapter for one in inputs], Recipe.from_json(found.recipe))
    assert isinstance(again, Merged)
    assert overall(again, bert, tasks) == max(scores(found))
    assert {name: (one["fingerprint"], one["count"]) for name, one in told["rows"].items()} == {
        name: (rows.fingerprint(), 20) for name, (_, rows) in tasks.items()
    }
    assert found.title == "ties + search"


def test_a_search_finds_the_better_weights(bert: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score with a known maximum: far from the start in one weight, and 0.7 off in the other."""
    pair = [
        inputs_of(random_adapter(bert, name, start=4 * place, targets="qv"))[0]
        for place, name in enumerate(("sst", "para"))
    ]

    def score(model: Merged, *_: object) -> float:
        return 1 - (model.weights["sst"] - 3) ** 2 - (model.weights["para"] - 0.3) ** 2

    monkeypatch.setattr(module, "overall", score)
    found = search(pair, Recipe("task_arithmetic"), {}, bert, 120)
    assert found.weights == pytest.approx({"sst": 3, "para": 0.3}, abs=0.02)
    assert found.recipe["weights"] == found.weights


def test_a_single_axis_and_a_single_evaluation_will_do(bert: Encoder, tasks: dict[str, tuple[Task, Rows]]) -> None:
    adapter = random_adapter(bert, "sst")
    one = {"sst": tasks["sst"]}
    found = search(inputs_of(adapter), Recipe("task_arithmetic"), one, bert, 6)
    assert len(scores(found)) == 6
    only = search(inputs_of(adapter), Recipe("task_arithmetic"), one, bert, 1)
    assert scores(only) == scores(found)[:1]
    assert only.weights == {"sst": 1.0}


class KilledError(Exception):
    """Stands for a signal."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many evaluations were computed, and at which count to be killed; a quick score stands for the true one."""
    state = [0, 10**9]

    def score(model: Merged, *_: object) -> float:
        if state[0] == state[1]:
            raise KilledError
        state[0] += 1
        return -sum((weight - 1) ** 2 for weight in model.weights.values())

    monkeypatch.setattr(module, "overall", score)
    return state


def test_a_killed_search_goes_on_to_the_same_end(
    bert: Encoder, inputs: list[MergeInput], tasks: dict[str, tuple[Task, Rows]], tmp_path: Path, counted: list[int]
) -> None:
    path = tmp_path / "a.search.json"
    whole = search(inputs, Recipe("fedavg"), tasks, bert, 12)
    counted[:] = [0, 9]
    with pytest.raises(KilledError):
        search(inputs, Recipe("fedavg"), tasks, bert, 12, path=path)
    assert len(json.loads(path.read_text())["evaluations"]) == 9
    counted[:] = [0, 3]
    resumed = search(inputs, Recipe("fedavg"), tasks, bert, 12, path=path)
    assert counted[0] == 3
    assert same(resumed, whole)
    counted[:] = [0, 2]
    longer = search(inputs, Recipe("fedavg"), tasks, bert, 14, path=path)
    assert counted[0] == 2
    assert scores(longer)[:12] == scores(whole)


def test_evaluations_of_another_search_are_not_used(
    bert: Encoder, inputs: list[MergeInput], tasks: dict[str, tuple[Task, Rows]], tmp_path: Path, counted: list[int]
) -> None:
    path = tmp_path / "a.search.json"

    def computed(recipe: Recipe, rows: Mapping[str, tuple[Task, Rows]] = tasks) -> int:
        counted[0] = 0
        search(inputs, recipe, rows, bert, 3, path=path)
        return counted[0]

    assert computed(Recipe("fedavg")) == 3
    assert computed(Recipe("fedavg")) == 0
    other = {name: (task, tiny_rows(task, 20, 1)) for name, (task, _) in tasks.items()}
    assert computed(Recipe("fedavg"), other) == 3
    assert computed(Recipe("fedavg", seed=1), other) == 3
    assert computed(Recipe("task_arithmetic", seed=1), other) == 3
    for broken in (path.read_text()[:-20], '{"key": 1}'):
        path.write_text(broken)
        with pytest.raises(CompositionError, match="remove it to start the search again"):
            computed(Recipe("task_arithmetic", seed=1), other)
    path.unlink()
    assert computed(Recipe("task_arithmetic", seed=1), other) == 3


def test_evaluations_under_another_default_or_source_are_not_used_and_those_of_a_spelled_out_one_are(
    bert: Encoder,
    inputs: list[MergeInput],
    tasks: dict[str, tuple[Task, Rows]],
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computed(**told: Any) -> int:
        counted[0] = 0
        search(inputs, Recipe("ties", **told), tasks, bert, 3, path=tmp_path / "a.search.json")
        return counted[0]

    assert computed() == 3
    density = ties.RECORD.options().density
    assert computed(options={"density": density}, weights={"sst": 1.0}, inputs=["a", "b", "c"]) == 0
    assert computed(options={"density": density / 2}) == 3
    assert computed() == 3
    changed = other_ties()
    with monkeypatch.context() as patch:
        patch.setattr(METHODS, "get", lambda name: changed)
        assert computed() == 3
    assert computed() == 3
    monkeypatch.setattr(module, "made_by", lambda: {"source": "of another version"})
    assert computed() == 3
    assert computed() == 0


@pytest.mark.parametrize(("start", "sign"), [("0.1", -1), ("1.0", 1)])
def test_options_stay_between_their_bounds(
    inputs: list[MergeInput], bert: Encoder, monkeypatch: pytest.MonkeyPatch, start: str, sign: int
) -> None:
    """The score pulls at a bound, once from within and once from the bound itself."""
    monkeypatch.setattr(module, "overall", lambda model, *_: sign * float(model.recipe["options"]["density"]))
    found = search(inputs[:1], Recipe("ties", options={"density": start}), {}, bert, 20, ("options",))
    tried = [one["options"]["density"] for one in found.trace["search"]["evaluations"]]
    assert tried[0] == float(start)
    assert all(0 <= one <= 1 for one in tried)
    assert (min(tried) < 0.1) if sign < 0 else (max(tried) == 1)
    assert len(set(tried)) > 10


def test_statistics_are_measured_once(
    inputs: list[MergeInput], bert: Encoder, tasks: dict[str, tuple[Task, Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*asked: Any) -> Any:
        calls.append(asked)
        return collect(*asked)

    monkeypatch.setattr(merging, "collect", counting)
    pair = {name: tasks[name] for name in ("sst", "sts")}
    found = search(inputs[:2], Recipe("regmean"), pair, bert, 3, context=given(bert))
    assert len(calls) == 2
    assert scores(found)[0] == overall(merged(trio(bert)[:2], "regmean", given=given(bert)), bert, pair)


def test_the_overall_score_is_that_of_an_evaluation(
    bert: Encoder, inputs: list[MergeInput], tasks: dict[str, tuple[Task, Rows]]
) -> None:
    model = merged([one.adapter for one in inputs], "fedavg")
    figures = {}
    for name, (task, rows) in tasks.items():
        figures[name] = score_task(mb.predictor(model, base=bert), task, rows).scores[0].value
    expected = np.mean([figures["sst"], (figures["sts"] + 1) / 2, figures["para"]])
    assert overall(model, bert, tasks) == pytest.approx(expected)


def test_outputs_that_are_not_finite_score_nothing(bert: Encoder, tasks: dict[str, tuple[Task, Rows]]) -> None:
    model = merged(trio(bert), "fedavg", dict.fromkeys(NAMES, 1.0))
    deltas = {site: delta.scaled(1e38) for site, delta in model.deltas.items()}
    model = dataclasses.replace(model, deltas=deltas)
    assert overall(model, bert, tasks) < -1


def test_the_layers_of_every_architecture_are_found(encoder: Encoder) -> None:
    one = inputs_of(random_adapter(encoder, "sst"))[0]
    groups = layer_groups([one])
    assert len(groups) == 2
    for site in one.deltas:
        matching = [number for number, group in enumerate(groups) if re.fullmatch(group, site)]
        assert matching == [number for number in (0, 1) if f".{number}." in site]


def test_factors_of_layers_hold_for_all_weights_there(inputs: list[MergeInput]) -> None:
    recipe = Recipe("task_arithmetic", weights={"sst": 2.0, "sts": 1.0, "para": 1.0})
    axes = find_axes(recipe, inputs, ("layers",))
    found = recipe_at(recipe, inputs, axes, [1.0, 0.5])
    assert found.at("encoder.layer.0.output.dense", found.weights) == {"sst": 2.0, "sts": 1.0, "para": 1.0}
    assert found.at("encoder.layer.1.output.dense", found.weights) == {"sst": 1.0, "sts": 0.5, "para": 0.5}


def test_twelve_layers_make_three_groups(inputs: list[MergeInput]) -> None:
    delta = LowRank(torch.zeros(2, 1), torch.zeros(1, 2))
    sites = [*(f"encoder.layer.{number}.output.dense" for number in range(12)), "embeddings_project"]
    groups = layer_groups([dataclasses.replace(inputs[0], deltas=dict.fromkeys(sites, delta))])
    assert groups == [r"\D*(0|1|2|3)\..*", r"\D*(4|5|6|7)\..*", r"\D*(8|9|10|11)\..*"]


@pytest.mark.parametrize(
    ("recipe", "over", "told"),
    [
        (Recipe("ensemble"), ("weights",), "ensemble, which keeps all adapters as they are"),
        (Recipe("adamerging"), ("weights",), "adamerging, which learns from rows by itself"),
        (Recipe("fedavg"), ("options",), "nothing that can be searched for fedavg"),
        (Recipe("fedavg", layers={".*": {"sst": 1.0}}), ("layers",), "a recipe with weights by layer"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    bert: Encoder, inputs: list[MergeInput], recipe: Recipe, over: tuple[str, ...], told: str
) -> None:
    with pytest.raises(CompositionError, match=told):
        search(inputs, recipe, {}, bert, 4, over)


def test_unknown_kinds_and_no_evaluations_are_refused(bert: Encoder, inputs: list[MergeInput]) -> None:
    with pytest.raises(UnknownNameError, match="`over`: 'wheights'"):
        search(inputs, Recipe("fedavg"), {}, bert, 4, ("wheights",))
    with pytest.raises(CompositionError, match="0 evaluations; expected at least 1"):
        search(inputs, Recipe("fedavg"), {}, bert, 0)


def test_the_command_searches_calibrates_and_tells(home: Path, tiny_folders: dict[str, Path]) -> None:
    words = ("merge", "--base", tiny_folders["bert"], "--data", "data", "--method", "ties", "--out", "m.safetensors")
    more = ("--search", "5", "--search-over", "weights,options", "--search-rows", "10")
    done = mbert(*words, *more, "--calibrate", "heads,scales", "--calibrate-rows", "20", here=home)
    assert done.code == 0, done.err
    model = mb.load(home / "m.safetensors")
    assert isinstance(model, Merged)
    assert f"wrote m.safetensors: {model.title} of" in done.out
    assert model.title == "ties + search + scales + heads"
    assert (
        f"search: overall {scores(model)[0]:.4f} at the start, {max(scores(model)):.4f} for the best of 5 merges "
        "(on the rows used for the search, where the best score is too optimistic; run eval on other rows)\n"
        in done.out
    )
    assert done.out.count(", cross-validated on 20 rows in 5 folds") == 2
    assert "no record of whether the training of its adapter held out the 10 rows of sst; " in done.err
    assert len(json.loads((home / "m.search.json").read_text())["evaluations"]) == 5
    shown = mbert("eval", "m.safetensors", "--base", tiny_folders["bert"], "--data", "data", here=home)
    assert shown.code == 0, shown.err
    assert json.loads((home / "m.scores.json").read_text())["role"] == model.title


def test_the_rows_of_the_search_are_refused_for_evaluation(
    home: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    files = [home / f"adapters/{task}.safetensors" for task in ("sst", "sts")]
    with pytest.warns(MbertWarning, match="no record of whether"):
        model = mb.search(files, "ties", 2, home / "data", held_out=10, base=tiny_folders["bert"])
    mb.save(model, home / "s.safetensors")
    write_corpus(tmp_path / "other", ("sst", "sts"), dev=12)
    train = mb.load_rows(get_task("sst"), "train", home / "data")
    places = [place for place, one in enumerate(train.hashes()) if one in seen(model)["search", "sst"]]
    fresh = next(place for place in range(len(train)) if place not in places)
    assert len(places) == 10

    def refused(chosen: Rows, told: str) -> None:
        lines = [f"{text}\t{label:.0f}" for (text,), label in zip(chosen.texts, chosen.labels or (), strict=True)]
        (tmp_path / "other/sst/dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        done = mbert("eval", home / "s.safetensors", "--base", tiny_folders["bert"], "--data", tmp_path / "other")
        assert done.code == (1 if told else 0), done.err
        assert told in done.err
        assert (home / "s.scores.json").exists() == (not told)

    among = "rows are among those whose labels the model has seen (search)"
    refused(train.take(places), f"task 'sst': 10 of 10 {among}")
    refused(train.take([*places[::-1], fresh]), f"task 'sst': 10 of 11 {among}")
    refused(train.take(places[1:]), f"task 'sst': 9 of 9 {among}")
    refused(train.take([fresh, places[3]]), f"task 'sst': 1 of 2 {among}")
    turned = dataclasses.replace(train, labels=tuple(4.0 - label for label in train.labels or ()))
    refused(turned.take(places[:2]), f"task 'sst': 2 of 2 {among}")
    refused(train.take([fresh, fresh]), "")


@pytest.mark.parametrize("how", ["export", "convert"])
def test_a_dense_folder_refuses_what_its_model_refuses(
    home: Path, tiny_folders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    files, base = [home / f"adapters/{task}.safetensors" for task in ("sst", "sts")], tiny_folders["bert"]
    with pytest.warns(MbertWarning, match="no record of whether"):
        model = mb.search(files, "ties", 1, home / "data", held_out=10, base=base)
    write_corpus(tmp_path / "other", ("sst",), dev=12)
    train = mb.load_rows(get_task("sst"), "train", home / "data")
    place = next(place for place, one in enumerate(train.hashes()) if one in seen(model)["search", "sst"])
    if how == "export":
        folder, _ = mb.export(model, tmp_path / "dense", base=base)
    else:
        mb.save(model, tmp_path / "m.safetensors")
        folder, _ = mb.convert(tmp_path / "m.safetensors", "hf", tmp_path / "dense", base=base)
    assert mb.evaluate(folder, tmp_path / "other").scores
    with (tmp_path / "other/sst/dev.tsv").open("a") as file:
        file.write(f"{train.texts[place][0]}\t0\n")
    told = r"dense/sst, task 'sst': 1 of 13 rows are among those whose labels the model has seen \(search\)"
    with pytest.raises(CompositionError, match=told):
        mb.evaluate(folder, tmp_path / "other")


@pytest.mark.parametrize("method", ["", Recipe(weights={"sst": 0.5})], ids=["no method", "a recipe without one"])
def test_python_searches_the_recommended_method_too(
    home: Path, tiny_folders: dict[str, Path], method: str | Recipe
) -> None:
    files = [home / f"adapters/{task}.safetensors" for task in ("sst", "sts")]
    with pytest.warns(MbertWarning, match="no record of whether"):
        model = mb.search(files, method, 1, home / "data", base=tiny_folders["bert"])
    assert model.method == "pico", "one that does not learn by itself, though there are rows"


def test_files_of_before_there_were_hashes_are_known_by_their_fingerprint(bert: Encoder) -> None:
    rows = {name: tiny_rows(get_task(name), 12) for name in NAMES}
    told = {name: {"fingerprint": one.fingerprint(), "count": 12} for name, one in rows.items()}
    model = dataclasses.replace(merged(trio(bert), "ties"), trace={"search": {"rows": told, "evaluations": []}})
    predictor = Predictor(model, bert)
    with pytest.raises(CompositionError, match="task 'sst': 12 of 12 rows are among those whose labels the model has"):
        evaluate_model(predictor, lambda task: rows[task.name])
    assert evaluate_model(predictor, lambda task: rows[task.name].take(range(11))).scores


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--calibrate", "heds"), "calibration"),
        (("--method", "ensemble", "--calibrate", "heads"), "a model that is not merged"),
        (("--method", "ensemble", "--search", "3"), "which keeps all adapters as they are"),
        (("--search", "0"), "--search"),
        (("--calibrate", "heads", "--calibrate-rows", "0"), "--calibrate-rows"),
    ],
)
def test_the_command_refuses_in_a_line(
    home: Path, tiny_folders: dict[str, Path], words: tuple[str, ...], told: str
) -> None:
    done = mbert("merge", "--base", tiny_folders["bert"], "--data", "data", *words, "--out", "x.safetensors", here=home)
    assert done.code != 0
    assert told in done.err
    assert not (home / "x.safetensors").exists()
