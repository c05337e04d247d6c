"""The Python interface: short calls that do what the commands do, and nothing on import."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.data.tasks import sst as sst_module
from mergekit_bert.errors import DataError, ModelFileError, OutputError
from tests.corpus import write_corpus
from tests.tiny import tiny_rows

QUICK = mb.TrainConfig(epochs=1, batch_size=8, hold_out=0.2, precision="fp32", lr=0.01)
SMALL = mb.AdapterConfig(rank=2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, with rows in data/."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "data", ("sst", "sts"), train=40, dev=12)
    return tmp_path


def adapter(task: str, base: mb.Encoder, **options: str) -> mb.Adapter:
    small = None if options.get("type") == "probe" else SMALL
    out = api.default_out(mb.get_task(task), options.get("type", "lora"))
    return mb.train_adapter(task, out=out, base=base, adapter=small, train=QUICK, **options)  # type: ignore[arg-type]


def test_the_whole_job_in_a_few_lines(bert: mb.Encoder, here: Path) -> None:
    adapters = [adapter(task, bert) for task in ("sst", "sts")]
    merged = mb.merge(adapters)
    mb.save(merged, "merged.safetensors")
    evaluation = mb.evaluate("merged.safetensors", base=bert)
    assert [(score.task, score.metric, score.n) for score in evaluation.scores] == [
        ("sst", "accuracy", 12),
        ("sst", "f1", 12),
        ("sts", "pearson", 12),
        ("sts", "spearman", 12),
    ]
    answers = mb.predictor("merged.safetensors", base=bert).predict("sts", [("a cat", "the dog"), ("good", "bad")])
    assert all(0 <= answer.value <= 5 for answer in answers)
    assert len(answers) == 2
    assert (here / "adapters/sst.safetensors").is_file()
    assert (here / "merged.scores.json").is_file()


def test_files_and_objects_are_taken_alike(bert: mb.Encoder) -> None:
    made = [adapter(task, bert) for task in ("sst", "sts")]
    paths = [Path("adapters/sst.safetensors"), "adapters/sts.safetensors"]
    one, two = mb.merge(made, "fedavg"), mb.merge(paths, "fedavg")
    mb.save(one, "one.safetensors")
    mb.save(two, "two.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    rows = tiny_rows(mb.get_task("sts"), 5)
    outputs = [
        mb.predictor(model, base=bert).outputs("sts", rows)
        for model in (one, mb.load("one.safetensors"), "one.safetensors", Path("two.safetensors"))
    ]
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)


def test_the_base_named_in_a_file_is_loaded_where_none_is_given(tiny_folders: dict[str, Path]) -> None:
    base = tiny_folders["bert"]
    mb.train_adapter("sst", out="adapters/sst.safetensors", base=base, adapter=SMALL, train=QUICK)
    found = mb.predictor("adapters/sst.safetensors").predict("sst", ["good film"])
    given = mb.predictor("adapters/sst.safetensors", base=str(base)).predict("sst", ["good film"])
    assert found == given


def test_every_kind_of_model_loads_as_what_it_is(bert: mb.Encoder) -> None:
    for task in ("sst", "sts"):
        adapter(task, bert)
    files = ["adapters/sst.safetensors", "adapters/sts.safetensors"]
    mb.save(mb.merge(files, "fedavg"), "merged.safetensors")
    mb.save(mb.merge(files, "ensemble"), "routed.safetensors")
    mb.finetune("sst", out="models/sst", base=bert, train=QUICK)
    kinds = [
        type(mb.load(path)).__name__ for path in (files[0], "merged.safetensors", "routed.safetensors", "models/sst")
    ]
    assert kinds == ["Adapter", "Merged", "Ensemble", "FullModel"]
    for path in ("merged.safetensors", "models/sst"):
        assert mb.predictor(path, base=bert).predict("sst", ["good"])[0].label in "01234"


def test_a_probe_does_not_take_the_adapters_place(bert: mb.Encoder, here: Path) -> None:
    adapter("sst", bert)
    adapter("sst", bert, type="probe")
    assert sorted(path.name for path in (here / "adapters").glob("*.safetensors")) == [
        "sst.probe.safetensors",
        "sst.safetensors",
    ]


def test_nothing_is_overwritten_unless_forced(bert: mb.Encoder) -> None:
    made = adapter("sst", bert)
    with pytest.raises(OutputError, match="it exists already"):
        adapter("sst", bert)
    with pytest.raises(OutputError, match="it exists already"):
        mb.save(made, "adapters/sst.safetensors")
    before = Path("adapters/sst.safetensors").read_bytes()
    mb.save(made, "adapters/sst.safetensors", force=True)
    assert Path("adapters/sst.safetensors").read_bytes() == before
    mb.export(made, "dense", base=bert)
    with pytest.raises(OutputError, match="dense/sst: it exists already"):
        mb.export(made, "dense", base=bert)


def test_evaluating_an_object_writes_nothing(bert: mb.Encoder, here: Path) -> None:
    made = adapter("sst", bert)
    before = sorted(here.rglob("*"))
    mb.evaluate(made, base=bert)
    assert sorted(here.rglob("*")) == before


def test_importing_and_calling_leave_torchs_settings_alone(bert: mb.Encoder) -> None:
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state())
    made = adapter("sst", bert)
    mb.predictor(made, base=bert).predict("sst", ["good"])
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_predicting_needs_the_right_base(bert: mb.Encoder, encoders: dict[str, mb.Encoder]) -> None:
    made = adapter("sst", bert)
    with pytest.raises(ModelFileError, match="made for base"):
        mb.predictor(made, base=encoders["electra"])


def own_task(here: Path) -> Path:
    """A task whose YAML says where its rows are, none of which lie in data/."""
    rows = write_corpus(here / "rows", ("sst",), train=40, dev=12)
    (here / "own.yml").write_text(
        "name: own\nkind: classify\ntext: sentence\nlabels: [0, 1, 2, 3, 4]\nmetric: f1\n"
        f"files: {{train: {rows / 'sst/train.tsv'}, dev: {rows / 'sst/dev.tsv'}}}\n"
    )
    return here / "own.yml"


def test_a_task_that_says_where_its_rows_are_is_evaluated_there(bert: mb.Encoder, here: Path) -> None:
    path = own_task(here)
    made = mb.train_adapter(path, out="adapters/own.safetensors", base=bert, adapter=SMALL, train=QUICK)
    assert made.training["examples"] == 32
    for task in (path, str(path), mb.get_task(path)):
        (score,) = mb.evaluate("adapters/own.safetensors", base=bert, tasks=[task]).scores
        assert (score.task, score.n) == ("own", 12)
    with pytest.raises(DataError, match="no folder data/own and no place on the Hub"):
        mb.evaluate("adapters/own.safetensors", base=bert)


def test_a_built_in_task_of_a_file_keeps_its_place_on_the_hub(
    bert: mb.Encoder, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    rows = tiny_rows(mb.get_task("sst"), 40)
    assert rows.labels is not None
    (here / "hub").mkdir()
    lines = [
        json.dumps({"text": text, "label": int(label)}) for (text,), label in zip(rows.texts, rows.labels, strict=True)
    ]
    for split in ("train", "validation"):
        (here / "hub" / f"{split}.jsonl").write_text("\n".join(lines))
    known = mb.get_task("sst")
    assert known.hub is not None
    place = dataclasses.replace(known.hub, path=str(here / "hub"), config=None)
    monkeypatch.setattr(sst_module, "RECORD", dataclasses.replace(known, hub=place))
    for path in (here / "data/sst").iterdir():
        path.unlink()
    (here / "data/sst").rmdir()
    adapter("sst", bert)
    assert mb.evaluate("adapters/sst.safetensors", base=bert).scores[0].n == 40
