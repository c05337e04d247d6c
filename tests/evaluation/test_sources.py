"""Where rows come from: what is scored on is never learned from, and no more is read than is needed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.source import load_rows
from mergekit_bert.data.task import get_task
from mergekit_bert.errors import CompositionError, DataError, UnknownNameError
from mergekit_bert.evaluation import merge_results
from mergekit_bert.training import run as training
from mergekit_bert.training.config import TrainConfig
from tests.corpus import write_corpus
from tests.evaluation.helpers import run

pytestmark = pytest.mark.usefixtures("quick_intervals")


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
    with pytest.raises(CompositionError, match="`texts`"):
        api.compare(three, ["ties"], data=data, texts=plain, out=tmp_path / "e", base=bert)
    with pytest.raises(UnknownNameError, match="`texts`"):
        api.compare(three, ["ties"], data=data, texts={"sat": plain["sst"]}, out=tmp_path / "e", base=bert)


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
    run_recipe = merge_results.run_recipe

    def look(recipe: Any, merge_inputs: Any, encoder: Any, tasks: Any, given: Any, *rest: Any) -> Any:
        for name, (_, rows) in tasks.items():
            seen[name], read[name] = rows, given.rows(name)
        return run_recipe(recipe, merge_inputs, encoder, tasks, given, *rest)

    monkeypatch.setattr("mergekit_bert.evaluation.compare.run_recipe", look)
    found = api.compare(inputs, ["ties", "regmean"], ["full"], data, on="held-out", out=tmp_path / "c", base=bert)
    assert found.rows == {"sst": 28, "sts": 28}
    for (kept, own), name in zip(held, ("sst", "sts"), strict=True):
        assert (seen[name].texts, seen[name].labels) == (own.texts, own.labels)
        assert set(read[name].texts) == set(kept.texts)
        assert read[name].labels is None
    text = (tmp_path / "c/table.md").read_text()
    assert text.startswith("scored on rows of train that training held out: 28 of sst, 28 of sts")
    assert json.loads((tmp_path / "c/table.json").read_text())["on"] == "held-out"
    api.compare(inputs, ["ties"], ["full"], data, on="held-out", calibrate=["heads"], out=tmp_path / "d", base=bert)
    for (_, own), name in zip(held, ("sst", "sts"), strict=True):
        assert len(seen[name]) == 14
        assert set(seen[name].texts) < set(own.texts)


def test_held_out_rows_of_other_training_are_refused(
    three: list[Adapter], bert: mb.Encoder, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompositionError, match="without a record of which rows"):
        run(three, bert, data, tmp_path / "c", on="held-out")
    told = {"hold_out": 0.1, "hold_out_limit": 1000, "seed": 0, "data": "of other rows"}
    other = [dataclasses.replace(one, training={**one.training, **told}) for one in three]
    with pytest.raises(CompositionError, match="other than those it was trained on"):
        run(other, bert, data, tmp_path / "c", on="held-out")
    with pytest.raises(UnknownNameError, match="`on`"):
        run(three, bert, data, tmp_path / "c", on="train")
    assert not (tmp_path / "c").exists()
