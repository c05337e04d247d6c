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
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.methods import ties
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.errors import CompositionError, DataError, MbertError, OutputError, UnknownNameError
from mergekit_bert.evaluation import contest, scores
from mergekit_bert.evaluation.pictures import contest_picture
from mergekit_bert.evaluation.records import write_record
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_text, contest_table
from mergekit_bert.training import run as training
from mergekit_bert.training.config import TrainConfig
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
    best = next(one for one in found.placed if one.cell.name != "ensemble")
    assert best.behind == (0.0, 0.0)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the merges that were made, in their order; a KeyboardInterrupt comes where "stop" is in it."""
    made, really = list[str](), contest.merge

    def count(ingredients: Any, recipe: Any, given: Any) -> Any:
        made.append(recipe.method)
        if "stop" in made and len(made) == 4:
            raise KeyboardInterrupt
        return really(ingredients, recipe, given)

    monkeypatch.setattr(contest, "merge", count)
    return made


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
    assert json.dumps(contest.to_json(again)) == json.dumps(contest.to_json(first))
    run(three, bert, data, tmp_path / "c", seed=1)
    assert len(merges) == 5, "all but the ensemble, which draws nothing"
    merges.clear()
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
    text = as_text(contest_table(found.placed, found.full))
    assert "% of full" in text
    for one, told in zip(found.placed, json.loads(Path("c/table.json").read_text())["standings"], strict=True):
        assert told["retention_full"]["sts"] == pytest.approx(one.values["sts"] / 0.6)
        assert told["retention_full"]["overall"] == pytest.approx(one.overall / 0.7)
        assert f"{100 * one.overall / 0.7:.1f}" in text


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


def known_cell(method: str, sst: list[int], sts: list[float], **changes: Any) -> contest.Cell:
    """A cell that answers ``sst`` with these labels and ``sts`` with these values."""
    outputs = {"sst": np.eye(5, dtype=np.float32)[sst], "sts": np.asarray(sts, dtype=np.float32)[:, None]}
    return contest.Cell(Recipe(method), outputs, 1.0, 2**20, None, **changes)


TRUE = {"sst": [0, 1, 2, 3, 4, 0, 1, 2], "sts": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
KNOWN = {
    name: (
        get_task(name),
        Rows(tuple(("a",) * len(get_task(name).text) for _ in true), tuple(map(float, true)), "known"),
    )
    for name, true in TRUE.items()
}
WHOLE = known_cell("ensemble", [0, 1, 2, 3, 4, 0, 0, 0], [0.0, 1.0, 2.0, 3.0, 5.0, 4.0])
TIES = known_cell("ties", [0, 1, 2, 0, 0, 1, 0, 0], [1.0, 0.0, 2.0, 3.0, 5.0, 4.0])
MEAN = known_cell("fedavg", [1, 0, 2, 3, 0, 1, 0, 0], [5.0, 4.0, 3.0, 1.0, 2.0, 0.0])


def test_retention_is_what_a_reader_works_out() -> None:
    found = {one.cell.name: one for one in contest.standings([WHOLE, TIES, MEAN], KNOWN)}
    # squared differences of ranks: 2 (ensemble), 4 (ties), 68 (fedavg); of six values r is 1 - their sum / 35
    pearson = {"ensemble": 1 - 2 / 35, "ties": 1 - 4 / 35, "fedavg": 1 - 68 / 35}
    right = {"ensemble": 6 / 8, "ties": 3 / 8, "fedavg": 2 / 8}
    overall = {name: (right[name] + (r + 1) / 2) / 2 for name, r in pearson.items()}
    for name, one in found.items():
        assert one.values == pytest.approx({"sst": right[name], "sts": pearson[name]})
        assert one.retention == pytest.approx(
            {
                "sst": right[name] / right["ensemble"],
                "sts": pearson[name] / pearson["ensemble"],
                "overall": overall[name] / overall["ensemble"],
            }
        )
    assert found["ties"].worst == (pytest.approx(0.5), "sst")
    assert found["fedavg"].worst == (pytest.approx(-1), "sts"), "a correlation counts as it is shown"
    line = next(one for one in as_text(contest_table(list(found.values()))).splitlines() if "fedavg" in one)
    assert "-100.0 sts" in line


def test_how_far_behind_is_a_paired_bootstrap_over_rows() -> None:
    source, apart = np.random.default_rng(0), list[float]()
    sst, sts = np.array(TRUE["sst"]), np.array(TRUE["sts"])

    def overall(cell: contest.Cell, some: Any, others: Any) -> float:
        right = (cell.outputs["sst"][some].argmax(1) == sst[some]).mean()
        true, said = sts[others], cell.outputs["sts"][others, 0]
        flat = true.std() == 0 or said.std() == 0
        return float((right + ((0.0 if flat else np.corrcoef(true, said)[0, 1]) + 1) / 2) / 2)

    for _ in range(40):
        some, others = source.integers(0, 8, 8), source.integers(0, 6, 6)
        apart.append(overall(TIES, some, others) - overall(MEAN, some, others))
    placed = {one.cell.name: one.behind for one in contest.standings([WHOLE, TIES, MEAN], KNOWN)}
    assert placed["fedavg"] == pytest.approx((np.percentile(apart, 2.5), np.percentile(apart, 97.5)))
    assert placed["fedavg"][0] < placed["fedavg"][1]
    assert placed["ties"] == (0.0, 0.0)
    assert placed["ensemble"][1] < placed["fedavg"][1], "the best merge is the reference, not the ensemble"


def test_without_the_ensemble_nothing_is_a_share_of_it(tmp_path: Path) -> None:
    refused = contest.Cell(Recipe("ensemble"), {}, 0.0, 0, None, "no single adapter")
    placed = contest.standings([refused, TIES, MEAN], KNOWN)
    assert [one.cell.name for one in placed] == ["ties", "fedavg"]
    for one in placed:
        assert one.retention == {"sst": None, "sts": None, "overall": None}
        assert one.worst is None
    lines = as_text(contest_table(placed)).splitlines()
    assert [line.split()[4:6] for line in lines if line.split()[0] in ("ties", "fedavg")] == [["–", "–"]] * 2
    told = contest.to_json(
        contest.Contest(placed, None, {"ensemble": "no single adapter"}, "dev", {"sst": 8, "sts": 6})
    )
    assert told["standings"][0]["retention"] == {"sst": None, "sts": None, "overall": None}
    json.dumps(told, allow_nan=False)
    contest_picture(placed, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(CompositionError, match=r"every merge was refused .*no single adapter"):
        contest.standings([refused, dataclasses.replace(TIES, refused="nor this")], KNOWN)


def test_merged_files_are_compared_without_an_ensemble_and_told_apart(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    two = [merge(three[:2], Recipe(method)) for method in ("fedavg", "task_arithmetic")]
    found = []
    for one in two:
        assert isinstance(one, mb.Merged)
        merges.clear()
        found.append(
            api.compare([one, three[2]], ["fedavg"], data=data, out=tmp_path / "c", base=bert, force=True).placed
        )
        assert merges == ["ensemble", "fedavg"], "another merge of the same adapters is another input"
    for (only,) in found:
        assert only.retention["overall"] is None
        assert only.worst is None
    assert found[0][0].overall != found[1][0].overall


def test_a_merge_that_has_seen_the_labels_of_the_rows_is_refused(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    one = merge(three[:2], Recipe("fedavg"))
    assert isinstance(one, mb.Merged)
    rows = load_rows(get_task("sst"), "dev", data).take([4])
    searched = dataclasses.replace(one, trace={"search": {"rows": {"sst": rows.record()}}})
    with pytest.raises(CompositionError, match=r"1 of 30 rows .* \(search\)"):
        api.compare([searched, three[2]], ["ties"], data=data, out=tmp_path / "c", base=bert)
    assert not (tmp_path / "c").exists()


def test_answers_that_are_not_finite_are_refused(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = contest.Predictor.outputs

    def overflown(self: Any, task: str, rows: Rows) -> Any:
        return np.full_like(really(self, task, rows), np.nan if isinstance(self.model, mb.Merged) else 0.0)

    monkeypatch.setattr(contest.Predictor, "outputs", overflown)
    found = api.compare(three, ["ties"], ["full"], data, out=tmp_path / "c", base=bert)
    assert [one.cell.name for one in found.placed] == ["ensemble"]
    assert "not finite" in found.refused["ties"]


def test_a_changed_default_is_another_cell_and_a_spelled_out_one_is_not(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {name: (get_task(name), load_rows(get_task(name), "dev", data)) for name in ("sst", "sts", "para")}

    def files(recipe: Recipe) -> int:
        (cell,) = contest.run_cells(recipe, [api.ingredient(one) for one in three], bert, tasks, None, tmp_path / "c")
        assert not cell.refused
        return len(list((tmp_path / "c").glob("*.safetensors")))

    usual = ties.RECORD.options().density
    assert files(Recipe("ties")) == 1
    assert files(Recipe("ties", options={"density": usual}, weights=dict.fromkeys(("sst", "sts"), 1.0))) == 1
    assert files(Recipe("ties", options={"density": usual / 2})) == 2
    assert files(Recipe("ties", weights={"sst": 0.25})) == 3

    @dataclasses.dataclass(frozen=True)
    class Other(ties.RECORD.options):  # type: ignore[misc, name-defined]
        density: float = dataclasses.field(
            default=usual / 3, metadata=ties.RECORD.options.__dataclass_fields__["density"].metadata
        )

    changed = dataclasses.replace(ties.RECORD, options=Other)
    monkeypatch.setattr(contest.METHODS, "get", lambda name: changed)
    assert files(Recipe("ties")) == 4
    monkeypatch.undo()
    monkeypatch.setattr(contest, "_code", lambda: {"source": "of another version"})
    assert files(Recipe("ties")) == 5


def test_rows_of_train_are_read_only_where_a_method_needs_some(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    for name in ("sst", "sts", "para"):
        (data / name / "train.tsv").unlink()
    found = api.compare(three, ["ties"], ["full"], data, out=tmp_path / "c", base=bert)
    assert not found.refused
    with pytest.raises(DataError, match="no file for the split 'train'"):
        api.compare(three, ["regmean"], data=data, out=tmp_path / "d", base=bert)
    assert not (tmp_path / "d").exists()
    plain = {}
    for name in ("sst", "sts", "para"):
        rows = load_rows(get_task(name), "dev", data)
        plain[name] = tmp_path / f"{name}.txt"
        plain[name].write_text("\n".join("\t".join(texts) for texts in rows.texts))
    found = api.compare(three, ["regmean"], data=data, texts=plain, out=tmp_path / "d", base=bert)
    assert not found.refused
    with pytest.raises(CompositionError, match="--texts"):
        api.compare(three, ["ties"], data=data, texts=plain, out=tmp_path / "e", base=bert)
    with pytest.raises(UnknownNameError, match="--texts"):
        api.compare(three, ["ties"], data=data, texts={"sat": plain["sst"]}, out=tmp_path / "e", base=bert)


def test_the_table_of_other_inputs_or_rows_is_not_written_over(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    out = tmp_path / "c"
    run(three, bert, data, out)
    api.compare(three, ["fedavg"], data=data, out=out, base=bert)
    merges.clear()
    before = {name: (out / name).read_bytes() for name in contest.RESULTS}
    for inputs, options in ((three[:2], {}), (three, {"limit": 20})):
        with pytest.raises(OutputError, match="--force"):
            api.compare(inputs, ["fedavg"], data=data, out=out, base=bert, **options)  # type: ignore[arg-type]
    assert merges == []
    assert {name: (out / name).read_bytes() for name in contest.RESULTS} == before
    api.compare(three[:2], ["fedavg"], data=data, out=out, base=bert, force=True)
    assert (out / "table.json").read_bytes() != before["table.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    with pytest.raises(OutputError, match=r"table\.md"):
        api.compare(three, ["fedavg"], data=data, out=tmp_path / "mine", base=bert)


@pytest.mark.filterwarnings("ignore:--calibrate heads")
def test_a_calibrated_merge_has_a_line_of_its_own_and_is_kept(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    more: dict[str, Any] = {"calibrate": ["heads", "scales"], "calibrate_rows": 40}
    plain = {one.cell.name: one for one in run(three, bert, data, tmp_path / "c").placed}
    merges.clear()
    found = {one.cell.name: one for one in run(three, bert, data, tmp_path / "c", **more).placed}
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
    assert line.cell.needs == ("rows", "labels")
    merges.clear()
    run(three, bert, data, tmp_path / "c", **more)
    assert merges == []
    run(three, bert, data, tmp_path / "c", calibrate=["heads", "scales"], calibrate_rows=30)
    assert len(merges) == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_are_those_that_training_held_out(
    bert: mb.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    data = write_corpus(tmp_path / "data", ("sst", "sts"), train=150)
    held, really = list[tuple[Rows, Rows]](), training.hold_out

    def spy(*given: Any) -> tuple[Rows, Rows]:
        held.append(really(*given))
        return held[-1]

    monkeypatch.setattr(training, "hold_out", spy)
    config = TrainConfig(epochs=1, hold_out=0.2, hold_out_limit=28, seed=seed, precision="fp32")
    inputs = [
        api.train_adapter(name, data, tmp_path / f"adapters/{name}.safetensors", base=bert, train=config)
        for name in ("sst", "sts")
    ]
    seen, read = dict[str, Rows](), dict[str, Rows]()
    run_cells = contest.run_cells

    def look(recipe: Any, ingredients: Any, encoder: Any, tasks: Any, given: Any, *rest: Any) -> Any:
        for name, (_, rows) in tasks.items():
            seen[name], read[name] = rows, given.rows(name)
        return run_cells(recipe, ingredients, encoder, tasks, given, *rest)

    monkeypatch.setattr(api, "run_cells", look)
    found = api.compare(inputs, ["ties", "regmean"], ["full"], data, on="held-out", out=tmp_path / "c", base=bert)
    assert found.rows == {"sst": 28, "sts": 28}
    for (kept, own), name in zip(held, ("sst", "sts"), strict=True):
        assert (seen[name].texts, seen[name].labels) == (own.texts, own.labels)
        assert set(read[name].texts) == set(kept.texts)
        assert read[name].labels is None
    text = (tmp_path / "c/table.md").read_text()
    assert text.startswith("scored on rows that training held out of train: 28 of sst, 28 of sts")
    assert json.loads((tmp_path / "c/table.json").read_text())["on"] == "held-out"
    api.compare(inputs, ["ties"], ["full"], data, on="held-out", calibrate=["heads"], out=tmp_path / "d", base=bert)
    for (_, own), name in zip(held, ("sst", "sts"), strict=True):
        assert len(seen[name]) == 14
        assert set(seen[name].texts) < set(own.texts)


def test_held_out_rows_of_other_training_are_refused(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompositionError, match="does not tell which rows"):
        run(three, bert, data, tmp_path / "c", on="held-out")
    told = {"hold_out": 0.1, "hold_out_limit": 1000, "seed": 0, "data": "of other rows"}
    other = [dataclasses.replace(one, training={**one.training, **told}) for one in three]
    with pytest.raises(CompositionError, match="not those it was trained on"):
        run(other, bert, data, tmp_path / "c", on="held-out")
    with pytest.raises(UnknownNameError, match="--on"):
        run(three, bert, data, tmp_path / "c", on="train")
    assert not (tmp_path / "c").exists()
