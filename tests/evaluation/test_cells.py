"""Cells: every one is the merge it says, scored as eval scores it, kept, and never computed twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing import source
from mergekit_bert.composing.merging import MergeContext, merge_inputs_of
from mergekit_bert.composing.methods import distill, ties
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.evaluation import merge_results, method_comparison
from tests.evaluation.helpers import SOME, other_ties, run

TASKS = ("sst", "sts", "para")
pytestmark = pytest.mark.usefixtures("quick_intervals")


def test_every_cell_is_the_merge_it_says_scored_as_eval_does(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    found = run(three, bert, data, tmp_path / "c")
    names = {one.result.name for one in found.merges}
    assert names == {"ensemble", "fedavg", "ties", "ties in core", "ties in knots", "regmean"}
    assert [one.overall for one in found.merges] == sorted((one.overall for one in found.merges), reverse=True)
    for one in found.merges:
        rows = {"data": data, "rows": 6} if one.result.recipe.method == "regmean" else {}
        model = mb.merge(three, one.result.recipe, base=bert, **rows)
        truth = {
            s.task: s.value for s in mb.evaluate(model, data, base=bert).scores if s.metric == get_task(s.task).metric
        }
        assert one.values == pytest.approx(truth, abs=1e-6)
        unit = [truth["sst"], truth["para"], (truth["sts"] + 1) / 2]
        assert one.overall == pytest.approx(np.mean(unit), abs=1e-6)
        assert one.result.size > 1000
        assert one.behind[0] <= one.behind[1]
    best = next(one for one in found.merges if one.result.name != "ensemble")
    assert best.behind == (0.0, 0.0)


def test_the_file_of_another_cell_is_not_taken_for_a_cell(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    run(three, bert, data, tmp_path / "c")
    one, other = sorted((tmp_path / "c").glob("*.safetensors"))[:2]
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    run(three, bert, data, tmp_path / "c")
    assert one.read_bytes() != other.read_bytes()
    assert len(one.read_bytes()) == len(before)


def test_what_is_finished_is_never_computed_again_and_what_changed_is(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    merges.append("stop")
    with pytest.raises(KeyboardInterrupt):
        run(three, bert, data, tmp_path / "c")
    merges.remove("stop")
    first = run(three, bert, data, tmp_path / "c")
    assert len(merges) == 3 + 4, "two were finished when it was killed"
    merges.clear()
    again = run(three, bert, data, tmp_path / "c")
    assert merges == []
    assert json.dumps(method_comparison.to_json(again)) == json.dumps(method_comparison.to_json(first))
    run(three, bert, data, tmp_path / "c", seed=1)
    assert merges == [], "none of these draws from the seed"
    other = [three[0], three[1], dataclasses.replace(three[2], scores={"other": 1.0})]
    run(other, bert, data, tmp_path / "c", force=True)
    assert len(merges) == 6
    merges.clear()
    run(three, bert, data, tmp_path / "c", limit=20, force=True)
    assert len(merges) == 6
    for path in (tmp_path / "c").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    merges.clear()
    run(three, bert, data, tmp_path / "c", force=True)
    assert len(merges) == 6, "a damaged cell is computed again"
    merges.clear()
    api.compare(three, SOME, data=data, rows=5, out=tmp_path / "c", base=bert)
    assert merges == ["regmean"], "other rows matter to the method that reads them"


def test_answers_that_are_not_finite_are_refused(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = merge_results.Predictor.outputs

    def overflown(self: Any, task: str, rows: Rows) -> Any:
        return np.full_like(really(self, task, rows), np.nan if isinstance(self.model, mb.Merged) else 0.0)

    monkeypatch.setattr(merge_results.Predictor, "outputs", overflown)
    found = api.compare(three, ["ties"], ["full"], data, out=tmp_path / "c", base=bert)
    assert [one.result.name for one in found.merges] == ["ensemble"]
    assert "not finite" in found.refused["ties"]


def test_a_changed_default_is_another_cell_and_a_spelled_out_one_is_not(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {name: (get_task(name), load_rows(get_task(name), "dev", data)) for name in TASKS}

    def files(recipe: Recipe) -> int:
        (result,) = merge_results.run_recipe(recipe, merge_inputs_of(three), bert, tasks, None, tmp_path / "c")
        assert not result.refused
        return len(list((tmp_path / "c").glob("*.safetensors")))

    usual = ties.RECORD.options().density
    assert files(Recipe("ties")) == 1
    assert files(Recipe("ties", options={"density": usual}, weights=dict.fromkeys(("sst", "sts"), 1.0))) == 1
    assert files(Recipe("ties", options={"density": usual / 2})) == 2
    assert files(Recipe("ties", weights={"sst": 0.25})) == 3

    changed = other_ties()
    monkeypatch.setattr(merge_results.METHODS, "get", lambda name: changed)
    assert files(Recipe("ties")) == 4
    monkeypatch.undo()
    monkeypatch.setattr(merge_results, "made_by", lambda: {"source": "of another version"})
    assert files(Recipe("ties")) == 5


def test_another_processor_makes_other_cells_and_the_precision_that_was_picked_is_told(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = merge_results.made_by()
    monkeypatch.setattr(source, "processor", lambda: "cuda of another kind")
    there = source._program.__wrapped__()
    assert {name for name in here if here[name] != there[name]} == {"processor"}
    monkeypatch.setattr(distill, "pick_precision", lambda asked, device: torch.bfloat16)
    merge_inputs = merge_inputs_of(three)
    tasks = {name: (get_task(name), load_rows(get_task(name), "dev", data).take(range(4))) for name in TASKS}
    given = MergeContext(lambda: bert, lambda name: dataclasses.replace(tasks[name][1], labels=None))
    recipe = Recipe("distill", options={"steps": 1, "batch_size": 2})
    (result,) = merge_results.run_recipe(recipe, merge_inputs, bert, tasks, given, tmp_path / "c")
    assert result.learned["precision"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:`(calibrate|steps)=heads`")
def test_a_calibrated_merge_has_a_line_of_its_own_and_is_kept(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    more: dict[str, Any] = {"calibrate": ["heads", "scales"], "calibrate_rows": 40}
    plain = {one.result.name: one for one in run(three, bert, data, tmp_path / "c").merges}
    merges.clear()
    found = {one.result.name: one for one in run(three, bert, data, tmp_path / "c", **more).merges}
    assert len(merges) == 5, "every merge once more, and not the ensemble"
    assert set(found) == set(plain) | {f"{name} + scales + heads" for name in plain if name != "ensemble"}
    for name, one in plain.items():
        assert found[name].values == one.values
    model = mb.merge(three, "ties")
    assert isinstance(model, mb.Merged)
    model = api.calibrate(model, data, steps=["scales", "heads"], rows=40, inputs=three, base=bert)
    scored = {(one.task, one.metric): one.value for one in mb.evaluate(model, data, base=bert).scores}
    line = found["ties + scales + heads"]
    truth = {task: scored[task, get_task(task).metric] for task in line.values}
    assert line.values == pytest.approx(truth, abs=1e-6)
    assert line.values != pytest.approx(found["ties"].values, abs=1e-6)
    assert line.result.needs == ("rows", "labels")
    merges.clear()
    run(three, bert, data, tmp_path / "c", **more)
    assert merges == []
    run(three, bert, data, tmp_path / "c", calibrate=["heads", "scales"], calibrate_rows=30)
    assert len(merges) == 5
