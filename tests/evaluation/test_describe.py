"""Descriptions: what ``inspect`` tells is what the file holds, for programs and for people."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import ModelFileError
from mergekit_bert.evaluation.describe import describe, description_tables
from mergekit_bert.evaluation.tables import as_text
from mergekit_bert.training.config import TrainConfig
from tests.adapters.helpers import random_adapter
from tests.corpus import write_corpus

QUICK = TrainConfig(epochs=1, batch_size=8, hold_out=0.2, precision="fp32", lr=0.01, seed=4)
TASKS = ("sst", "sts")
FILES = {
    "adapter": "sst.safetensors",
    "probe": "probe.safetensors",
    "merged": "merged.safetensors",
    "ensemble": "routed.safetensors",
    "full": "full",
    "dense": "dense/sts",
}


@pytest.fixture(scope="module")
def folder(bert: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("described")
    write_corpus(root / "corpus", TASKS)
    config = AdapterConfig(rank=2, rank_stabilized=True, train_bias=True)
    for task in TASKS:
        mb.train_adapter(task, root / "corpus", root / f"{task}.safetensors", base=bert, adapter=config, train=QUICK)
    mb.train_adapter("sst", root / "corpus", root / "probe.safetensors", base=bert, type="probe", train=QUICK)
    mb.finetune("sst", root / "corpus", root / "full", base=bert, train=QUICK)
    files = [root / f"{task}.safetensors" for task in TASKS]
    merged = mb.merge(files, "fedavg", {"sts": -0.5})
    mb.save(merged, root / "merged.safetensors")
    mb.save(mb.merge(files, "ensemble"), root / "routed.safetensors")
    mb.export(merged, root / "dense", base=bert)
    return root


def test_a_value_whose_range_nobody_knows_is_described(bert: Encoder, tmp_path: Path) -> None:
    """As that of a stranger's regression."""
    task = mb.Task("length", "regress", ("text",), ("pearson",))
    write_adapter(tmp_path / "a.safetensors", random_adapter(bert, task))
    text = "".join(map(as_text, description_tables(describe(tmp_path / "a.safetensors"))))
    assert "a value" in next(line for line in text.splitlines() if "labels" in line)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_described(folder: Path, bert: Encoder, name: str) -> None:
    path = folder / FILES[name]
    told = json.loads(json.dumps(describe(path), allow_nan=False))
    assert told["kind"] == {"probe": "adapter", "full": "fullmodel", "dense": "fullmodel"}.get(name, name)
    assert told["role"] == {"merged": "fedavg"}.get(name, name)
    assert told["base"]["fingerprint"] == bert.fingerprint
    tasks = {"merged": {*TASKS}, "ensemble": {*TASKS}, "dense": {"sts"}}.get(name, {"sst"})
    assert set(told["parts"]) == tasks
    for task, part in told["parts"].items():
        assert part["task"] == json.loads(json.dumps(mb.get_task(task).to_json()))
    if path.is_file():
        assert told["bytes"] == path.stat().st_size
        assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        assert told["bytes"] == sum(file.stat().st_size for file in path.iterdir())


def test_norms_and_ranks_are_those_of_the_matrices(folder: Path) -> None:
    told, adapter = describe(folder / "sst.safetensors"), read_adapter(folder / "sst.safetensors")
    assert set(told["sites"]) == set(adapter.sites)
    for site, facts in told["sites"].items():
        matrix = adapter.tensors[site]["B"] @ adapter.tensors[site]["A"] * adapter.config.scale
        assert facts["norm"] == pytest.approx(float(matrix.double().norm()), rel=1e-5)
        assert (facts["rank"], facts["size"]) == (2, list(matrix.shape))
    for name, facts in told["shifts"].items():
        assert facts["norm"] == pytest.approx(float(torch.linalg.norm(adapter.shifts[name])), rel=1e-6)
    merged = describe(folder / "merged.safetensors")
    other = read_adapter(folder / "sts.safetensors")
    assert merged["space"] == "full"
    for name, one in (("sst", adapter), ("sts", other)):
        exact = float(one.deltas()["pooler.dense"].dense().norm())
        assert list(merged["own"][name]["sites"]) == ["pooler.dense"]
        assert merged["own"][name]["sites"]["pooler.dense"]["norm"] == pytest.approx(exact, rel=1e-4)
    for site, facts in merged["sites"].items():
        total = merged["weights"]["sst"] * adapter.deltas()[site].dense() - 0.5 * other.deltas()[site].dense()
        assert facts["norm"] == pytest.approx(float(total.norm()), rel=1e-4)
        assert facts["rank"] == 4
    routed = describe(folder / "routed.safetensors")
    assert set(routed["own"]) == {*TASKS}
    assert routed["own"]["sst"]["sites"] == told["sites"]


def text_of(told: dict[str, Any]) -> str:
    return "\n".join(as_text(table) for table in description_tables(told))


SHOWN = {
    "adapter": ("sst", "very negative", "rank", "seed 0", "rank-stabilised", "all-linear", "float32", "48"),
    "probe": ("probe", "accuracy"),
    "merged": ("fedavg", "-0.5", "sst", "sts", "0 to 5"),
    "ensemble": ("ensemble", "sst", "sts"),
    "full": ("full", "sst"),
    "dense": ("dense", "sts"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_person_reads_the_same(folder: Path, bert: Encoder, name: str) -> None:
    told = describe(folder / FILES[name])
    text = text_of(told)
    for word in (*SHOWN[name], bert.fingerprint[:16], told["sha256"][:16]):
        assert word in text, word


def test_recorded_scores_are_told(folder: Path, bert: Encoder) -> None:
    path = folder / "sst.safetensors"
    assert describe(path)["recorded"] == []
    score = mb.evaluate(path, folder / "corpus", base=bert).scores[0]
    told = describe(path)
    assert told["recorded"][0]["value"] == score.value
    assert f"{score.value:.3f}" in text_of(told).split("recorded scores")[1]


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_not_ours_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"odd.safetensors: "):
        describe(tmp_path / "odd.safetensors")
    with pytest.raises(ModelFileError, match=r"mbert.json: no such file"):
        describe(tmp_path)
    with pytest.raises(ModelFileError, match=r"none: no such file"):
        describe(tmp_path / "none")
