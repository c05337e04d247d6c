"""The contest: every cell is the merge it says, scored as eval scores it, kept, and never computed twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.errors import MbertError, UnknownNameError
from mergekit_bert.evaluation import contest, scores
from mergekit_bert.evaluation.records import write_record
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_text, contest_table
from tests.composing.helpers import trio
from tests.corpus import write_corpus

SOME = ["fedavg", "ties", "regmean"]


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "RESAMPLES", 20)
    monkeypatch.setattr(contest, "RESAMPLES", 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "data", ("sst", "sts", "para"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv")


def run(three: list[Adapter], bert: mb.Encoder, data: Path, out: Path, **options: Any) -> contest.Contest:
    return api.compare(three, SOME, data=data, rows=6, out=out, base=bert, **options)


def test_every_cell_is_the_merge_it_says_scored_as_eval_does(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    found = run(three, bert, data, tmp_path / "c")
    names = {one.cell.name for one in found.placed}
    assert names == {"ensemble", "fedavg", "ties", "ties in core", "ties in knots", "regmean"}
    assert [one.overall for one in found.placed] == sorted((one.overall for one in found.placed), reverse=True)
    for one in found.placed:
        rows = data if one.cell.recipe.method == "regmean" else None
        model = mb.merge(three, one.cell.recipe, data=rows, rows=6, base=bert)
        truth = {
            s.task: s.value for s in mb.evaluate(model, data, base=bert).scores if s.metric == get_task(s.task).metric
        }
        assert one.values == pytest.approx(truth, abs=1e-6)
        unit = [truth["sst"], truth["para"], (truth["sts"] + 1) / 2]
        assert one.overall == pytest.approx(np.mean(unit), abs=1e-6)
        assert one.cell.size > 1000
        assert one.behind[0] <= one.behind[1]
    whole = next(one for one in found.placed if one.cell.name == "ensemble")
    assert set(whole.retention.values()) == {1.0}
    best = next(one for one in found.placed if one.cell.name != "ensemble")
    assert best.behind == (0.0, 0.0)


def test_what_is_finished_is_never_computed_again_and_what_changed_is(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = list[str]()
    really = contest.merge

    def count(ingredients: Any, recipe: Any, given: Any) -> Any:
        merges.append(recipe.method)
        if len(merges) == stop:
            raise KeyboardInterrupt
        return really(ingredients, recipe, given)

    monkeypatch.setattr(contest, "merge", count)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        run(three, bert, data, tmp_path / "c")
    stop = -1
    first = run(three, bert, data, tmp_path / "c")
    assert len(merges) == 3 + 4, "two were finished when it was killed"
    merges.clear()
    again = run(three, bert, data, tmp_path / "c")
    assert merges == []
    assert json.dumps(contest.to_json(again)) == json.dumps(contest.to_json(first))
    run(three, bert, data, tmp_path / "c", seed=1)
    assert len(merges) == 5, "all but the ensemble, which draws nothing"
    merges.clear()
    run([three[0], three[1], dataclasses.replace(three[2], scores={"other": 1.0})], bert, data, tmp_path / "c")
    assert len(merges) == 6
    merges.clear()
    run(three, bert, data, tmp_path / "c", limit=20)
    assert len(merges) == 6
    for path in (tmp_path / "c").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    merges.clear()
    run(three, bert, data, tmp_path / "c")
    assert len(merges) == 6, "a damaged cell is computed again"


def test_the_results_are_written_and_the_table_tells_what_it_cost(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    found = run(three, bert, data, tmp_path / "c")
    told = json.loads((tmp_path / "c/table.json").read_text())
    assert [one["name"] for one in told["standings"]] == [one.cell.name for one in found.placed]
    assert (tmp_path / "c/picture.png").read_bytes().startswith(b"\x89PNG")
    text = as_text(contest_table(found.placed, found.full))
    assert "% of full" not in text
    for one in found.placed:
        assert f"{one.overall:.3f}" in text
    assert "gram" in text
    assert (tmp_path / "c/table.md").read_text().count("|") > 50


def test_full_fine_tuning_is_a_column_where_it_is_recorded(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("sst", 0.5), ("para", 0.8), ("sts", 0.6)):
        task = get_task(name)
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        rows = load_rows(task, "dev", data)
        score = Score(name, task.metric, value, value, value, len(rows), rows.fingerprint())
        full = mb.FullModel(folder, task, 40, {"fingerprint": bert.fingerprint}, {"kind": "full"})
        write_record(folder, full, [score])
    found = run(three, bert, data, Path("c"))
    assert found.full == pytest.approx({"sst": 0.5, "para": 0.8, "sts": 0.6, "overall": (0.5 + 0.8 + 0.8) / 3})
    assert "% of full" in as_text(contest_table(found.placed, found.full))


def test_what_cannot_be_merged_is_left_out_with_the_reason(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    loose = [dataclasses.replace(one, basis=None) for one in three]
    found = api.compare(loose, ["fedavg", "orthoada"], data=data, rows=6, out=tmp_path / "c", base=bert)
    assert list(found.refused) == ["orthoada"]
    assert "trained without an orthogonal basis" in found.refused["orthoada"]
    for wrong, kind in (({"methods": ["tise"]}, UnknownNameError), ({"spaces": ["cor"]}, UnknownNameError)):
        with pytest.raises(kind):
            api.compare(three, data=data, out=tmp_path / "d", base=bert, **wrong)  # type: ignore[arg-type]
    with pytest.raises(MbertError, match="no adapters"):
        api.compare([], data=data, out=tmp_path / "d", base=bert)
    assert not (tmp_path / "d").exists()
