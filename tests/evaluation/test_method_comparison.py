"""The method comparison: its table, the files beside it, and how far a merge is behind the best."""

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
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Base
from mergekit_bert.errors import CompositionError, MbertError, OutputError, UnknownNameError
from mergekit_bert.evaluation import method_comparison
from mergekit_bert.evaluation.merge_results import MergeResult
from mergekit_bert.evaluation.pictures import write_picture
from mergekit_bert.evaluation.records import write_record
from mergekit_bert.evaluation.scores import Score
from mergekit_bert.evaluation.tables import as_text, method_table, missing_references
from tests.evaluation.helpers import run

pytestmark = pytest.mark.usefixtures("quick_intervals")


def test_the_results_are_written_and_the_table_tells_what_it_cost(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    found = run(three, bert, data, tmp_path / "c")
    told = json.loads((tmp_path / "c/table.json").read_text())
    assert [one["name"] for one in told["standings"]] == [one.result.name for one in found.merges]
    assert (tmp_path / "c/picture.png").read_bytes().startswith(b"\x89PNG")
    text = as_text(method_table(found.merges, found.full))
    assert "% of full" not in text
    for one in found.merges:
        assert f"{one.overall:.3f}" in text
    assert "gram" in text
    assert (tmp_path / "c/table.md").read_text().count("|") > 50


FULL = {"sst": 0.5, "para": 0.8, "sts": 0.6}


def record_full(name: str, folder: Path, bert: mb.Encoder, data: Path) -> None:
    """A figure of full fine-tuning on all dev rows of a task, recorded for ``folder/<task>``."""
    task, value = get_task(name), FULL[name]
    (folder / name).mkdir(parents=True)
    rows = load_rows(task, "dev", data)
    score = Score(name, task.metric, value, value, value, len(rows), rows.fingerprint())
    full = mb.FullModel(folder / name, task, 40, Base.of(bert), {"kind": "full"})
    write_record(folder / name, full, [score])


def test_full_fine_tuning_is_a_column_where_it_is_recorded(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FULL:
        record_full(name, tmp_path / "models", bert, data)
    found = run(three, bert, data, Path("c"))
    assert found.full == pytest.approx({**FULL, "overall": (0.5 + 0.8 + 0.8) / 3})
    assert missing_references(found) == ""
    text = as_text(method_table(found.merges, found.full))
    assert "% of full" in text
    for one, told in zip(found.merges, json.loads(Path("c/table.json").read_text())["standings"], strict=True):
        assert told["retention_full"]["sts"] == pytest.approx(one.values["sts"] / 0.6)
        assert told["retention_full"]["overall"] == pytest.approx(one.overall / 0.7)
        assert f"{100 * one.overall / 0.7:.1f}" in text


def test_what_would_record_full_fine_tuning_is_said_where_it_can_be(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    record_full("para", tmp_path / "c/models", bert, data)
    base = three[0].base.name

    def said(**options: Any) -> str:
        found = api.compare(three, ["fedavg"], data=data, out=tmp_path / "c", base=bert, force=True, **options)
        assert found.full is None
        return missing_references(found)

    commands = [f"mbert finetune --task {name} --data {data} --base {base}" for name in ("sst", "sts")]
    assert said() == f"missing: scores of full fine-tuning on these rows; record them with: {'; '.join(commands)}"
    assert said(limit=30) == said(), "all rows"
    assert said(limit=20).startswith("no % of full")
    assert json.loads((tmp_path / "c/table.json").read_text())["missing"] == []


@pytest.mark.parametrize("place", ["in", "in/models", "models", "in/adapters"])
def test_full_fine_tuning_is_looked_up_around_the_inputs(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, place: str
) -> None:
    files = [tmp_path / "in" / f"{one.task.name}.safetensors" for one in three]
    for one, file in zip(three, files, strict=True):
        mb.save(one, file)
    for name in FULL:
        record_full(name, tmp_path / place, bert, data)
    found = api.compare(files, ["fedavg"], data=data, out=tmp_path / "elsewhere/c", base=bert)
    assert found.full is not None


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


def known_result(method: str, sst: list[int], sts: list[float], **changes: Any) -> MergeResult:
    """A result that answers ``sst`` with these labels and ``sts`` with these values."""
    outputs = {"sst": np.eye(5, dtype=np.float32)[sst], "sts": np.asarray(sts, dtype=np.float32)[:, None]}
    return MergeResult(Recipe(method), outputs, 1.0, 2**20, None, **changes)


TRUE = {"sst": [0, 1, 2, 3, 4, 0, 1, 2], "sts": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
KNOWN = {
    name: (
        get_task(name),
        Rows(tuple(("a",) * len(get_task(name).text) for _ in true), tuple(map(float, true)), "known"),
    )
    for name, true in TRUE.items()
}
WHOLE = known_result("ensemble", [0, 1, 2, 3, 4, 0, 0, 0], [0.0, 1.0, 2.0, 3.0, 5.0, 4.0])
TIES = known_result("ties", [0, 1, 2, 0, 0, 1, 0, 0], [1.0, 0.0, 2.0, 3.0, 5.0, 4.0])
MEAN = known_result("fedavg", [1, 0, 2, 3, 0, 1, 0, 0], [5.0, 4.0, 3.0, 1.0, 2.0, 0.0])


def test_retention_is_what_a_reader_works_out() -> None:
    found = {one.result.name: one for one in method_comparison.comparison_rows([WHOLE, TIES, MEAN], KNOWN)}
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
    line = next(one for one in as_text(method_table(list(found.values()))).splitlines() if "fedavg" in one)
    assert "-100.0 sts" in line


def test_how_far_behind_is_a_paired_bootstrap_over_rows() -> None:
    source, apart = np.random.default_rng(0), list[float]()
    sst, sts = np.array(TRUE["sst"]), np.array(TRUE["sts"])

    def overall(result: MergeResult, some: Any, others: Any) -> float:
        right = (result.outputs["sst"][some].argmax(1) == sst[some]).mean()
        true, said = sts[others], result.outputs["sts"][others, 0]
        flat = true.std() == 0 or said.std() == 0
        return float((right + ((0.0 if flat else np.corrcoef(true, said)[0, 1]) + 1) / 2) / 2)

    for _ in range(40):
        some, others = source.integers(0, 8, 8), source.integers(0, 6, 6)
        apart.append(overall(TIES, some, others) - overall(MEAN, some, others))
    rows = {one.result.name: one.behind for one in method_comparison.comparison_rows([WHOLE, TIES, MEAN], KNOWN)}
    assert rows["fedavg"] == pytest.approx((np.percentile(apart, 2.5), np.percentile(apart, 97.5)))
    assert rows["fedavg"][0] < rows["fedavg"][1]
    assert rows["ties"] == (0.0, 0.0)
    assert rows["ensemble"][1] < rows["fedavg"][1], "the best merge is the reference, not the ensemble"


def test_without_the_ensemble_nothing_is_a_share_of_it(tmp_path: Path) -> None:
    refused = MergeResult(Recipe("ensemble"), {}, 0.0, 0, None, "no single adapter")
    rows = method_comparison.comparison_rows([refused, TIES, MEAN], KNOWN)
    assert [one.result.name for one in rows] == ["ties", "fedavg"]
    for one in rows:
        assert one.retention == {"sst": None, "sts": None, "overall": None}
        assert one.worst is None
    lines = as_text(method_table(rows)).splitlines()
    assert [line.split()[4:6] for line in lines if line.split()[0] in ("ties", "fedavg")] == [["–", "–"]] * 2
    shown = method_comparison.MethodComparison(
        rows, None, {"ensemble": "no single adapter"}, "dev", {"sst": 8, "sts": 6}
    )
    told = method_comparison.to_json(shown)
    assert told["standings"][0]["retention"] == {"sst": None, "sts": None, "overall": None}
    json.dumps(told, allow_nan=False)
    write_picture(shown.plot(), tmp_path / "p.png")
    assert [line["merge"] for line in shown.records()] == [one.result.name for one in rows]
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(CompositionError, match=r"every merge was refused .*no single adapter"):
        method_comparison.comparison_rows([refused, dataclasses.replace(TIES, refused="nor this")], KNOWN)


def test_merged_files_are_compared_without_an_ensemble_and_told_apart(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    two = [merge(three[:2], Recipe(method)) for method in ("fedavg", "task_arithmetic")]
    found = []
    for one in two:
        assert isinstance(one, mb.Merged)
        merges.clear()
        found.append(
            api.compare([one, three[2]], ["fedavg"], data=data, out=tmp_path / "c", base=bert, force=True).merges
        )
        assert merges == ["ensemble", "fedavg"], "another merge of the same adapters is another input"
    for (only,) in found:
        assert only.retention["overall"] is None
        assert only.worst is None
    assert found[0][0].overall != found[1][0].overall


def test_the_table_of_other_inputs_or_rows_is_not_written_over(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path, merges: list[str]
) -> None:
    out = tmp_path / "c"
    run(three, bert, data, out)
    api.compare(three, ["fedavg"], data=data, out=out, base=bert)
    merges.clear()
    before = {name: (out / name).read_bytes() for name in method_comparison.RESULTS}
    for inputs, options in ((three[:2], {}), (three, {"limit": 20})):
        with pytest.raises(OutputError, match="`force`"):
            api.compare(inputs, ["fedavg"], data=data, out=out, base=bert, **options)  # type: ignore[arg-type]
    assert merges == []
    assert {name: (out / name).read_bytes() for name in method_comparison.RESULTS} == before
    api.compare(three[:2], ["fedavg"], data=data, out=out, base=bert, force=True)
    assert (out / "table.json").read_bytes() != before["table.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table.md").write_text("mine")
    with pytest.raises(OutputError, match=r"table\.md"):
        api.compare(three, ["fedavg"], data=data, out=tmp_path / "mine", base=bert)


@pytest.mark.filterwarnings("ignore:`(calibrate|steps)=heads`")
def test_a_later_call_adds_its_lines_and_computes_no_earlier_one(
    three: list[Adapter],
    bert: mb.Encoder,
    data: Path,
    tmp_path: Path,
    merges: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "c"

    def lines(method: str, **options: Any) -> dict[str, Any]:
        found = api.compare(three, [method], ["full"], data, out=out, base=bert, **options)
        told = json.loads((out / "table.json").read_text())["standings"]
        assert [one["name"] for one in told] == [one.result.name for one in found.merges]
        assert all(one["name"] in (out / "table.md").read_text() for one in told)
        return {one["name"]: one["values"] for one in told}

    calls: list[tuple[str, dict[str, Any], set[str]]] = [
        ("dare", {}, {"ensemble", "dare"}),
        ("dare", {"seed": 1}, {"dare seed 1"}),
        ("ties", {"seed": 1}, {"ties"}),
        ("ties", {"rank": 2}, {"ties rank 2"}),
        ("ties", {"private": 2}, {"ties + private 2"}),
        ("fedavg", {"calibrate": ["heads"], "calibrate_rows": 20}, {"fedavg", "fedavg + heads"}),
        ("ties", {}, set()),
    ]
    before: dict[str, Any] = {}
    for method, options, new in calls:
        found = lines(method, **options)
        assert set(found) == set(before) | new
        assert {name: found[name] for name in before} == before
        before = found
    assert merges == ["ensemble", "dare", "dare", "ties", "ties", "ties", "fedavg"]
    assert before["dare"] != before["dare seed 1"]

    merges.clear()
    gone = next(one for one in json.loads((out / "table.json").read_text())["standings"] if one["name"] == "dare")
    (out / f"{gone['cell']}.safetensors").unlink()
    assert set(lines("ties")) == set(before) - {"dare"}
    monkeypatch.setattr(method_comparison, "made_by", lambda: {"source": "of another version"})
    assert set(lines("ties")) == {"ensemble", "ties"}
    assert merges == []


def test_the_same_merge_learned_on_other_rows_takes_the_place_of_its_line(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    tables = [api.compare(three, ["regmean"], data=data, rows=rows, out=tmp_path / "c", base=bert) for rows in (6, 5)]
    found = [{one.result.name: one.result for one in table.merges} for table in tables]
    assert set(found[0]) == set(found[1]) == {"ensemble", "regmean"}
    assert found[0]["regmean"].key != found[1]["regmean"].key
    told = json.loads((tmp_path / "c/table.json").read_text())["standings"]
    assert {one["name"]: one["cell"] for one in told} == {name: result.key for name, result in found[1].items()}
