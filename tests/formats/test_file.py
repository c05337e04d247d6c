"""Merged and ensemble files: the same bytes, back as they were, and broken ones refused."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Dense, LowRank
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.errors import ModelFileError
from mergekit_bert.formats import file as model_file
from mergekit_bert.formats.file import read_model, write_model
from tests.adapters.helpers import (
    as_format_1,
    edit_metadata,
    edit_tensors,
    one_line,
    quick,
    random_adapter,
    renamed,
    same_adapter,
    same_tensors,
    try_odd_values,
)
from tests.composing.helpers import ONE, merge, merged, trio

SITE = "encoder.layer.0.attention.self.query"
KINDS = ("merged", "dense", "ensemble")


def test_sites_without_values_cannot_ask_for_memory(bert: mb.Encoder) -> None:
    model = merged(trio(bert), "ties")
    huge = LowRank(torch.zeros(2**20, 0), torch.zeros(0, 2**20))
    tensors, record = model_file._pack_merged(dataclasses.replace(model, deltas={**model.deltas, "huge": huge}))
    with pytest.raises(ModelFileError, match=r"sites of 1,099,5[\d,]+ values to [\d,]+ in the file; expected sites as"):
        model_file._unpack_merged("m", tensors, record)


def same_merged(one: mb.Merged, two: mb.Merged) -> bool:
    """Whether two merged models are equal bit for bit."""

    def tensors(model: mb.Merged) -> dict[str, Tensor]:
        found = dict(model.shifts)
        everywhere = [("", model.deltas), *((task, own.deltas) for task, own in model.own.items())]
        for task, deltas in everywhere:
            for site, delta in deltas.items():
                parts = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}
                found |= {f"{task} {site}.{name}": value for name, value in parts.items()}
        for task, own in model.own.items():
            found |= {f"{task} {name}": value for name, value in {**own.head, **own.shifts}.items()}
        return found

    def rest(model: mb.Merged) -> object:
        return model.method, dict(model.weights), model.base, json.loads(json.dumps(dict(model.parts))), model.tasks

    return rest(one) == rest(two) and same_tensors(tensors(one), tensors(two))


def same_model(one: Any, two: Any) -> bool:
    """Whether two compositions are equal bit for bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Adapter):
        return same_adapter(one, two)
    if isinstance(one, mb.Merged):
        return same_merged(one, two)
    return list(one.experts) == list(two.experts) and all(
        same_adapter(one.experts[task], two.experts[task]) for task in one.experts
    )


@pytest.fixture(scope="module")
def models(bert: mb.Encoder) -> dict[str, Any]:
    adapters = trio(bert, targets="qv", train_layernorm=True)
    both = merged(adapters, "fedavg", {"sst": -0.5})
    deltas = {site: Dense(delta.dense()) for site, delta in both.deltas.items()}
    return {
        "merged": both,
        "dense": dataclasses.replace(both, deltas=deltas),
        "ensemble": merge(adapters, "ensemble"),
    }


@pytest.fixture(scope="module")
def wholes(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        write_model(folder / name, model)
    return {name: (folder / name).read_bytes() for name in models}


@pytest.fixture
def path(wholes: dict[str, bytes], tmp_path: Path, kind: str) -> Path:
    found = tmp_path / "model.safetensors"
    found.write_bytes(wholes[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_as_it_was(models: dict[str, Any], path: Path, kind: str) -> None:
    assert same_model(read_model(path), models[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_writing_what_was_read_gives_the_same_bytes(path: Path, wholes: dict[str, bytes], kind: str) -> None:
    write_model(path.with_name("again"), read_model(path))
    assert path.with_name("again").read_bytes() == wholes[kind]


@pytest.mark.parametrize("kind", ["merged", "ensemble"])
def test_merging_again_gives_the_same_bytes(
    bert: mb.Encoder, tmp_path: Path, wholes: dict[str, bytes], kind: str
) -> None:
    adapters = trio(bert, targets="qv", train_layernorm=True)
    model = merge(adapters, "ensemble") if kind == "ensemble" else merge(adapters, "fedavg", {"sst": -0.5})
    write_model(tmp_path / "x", model)
    assert (tmp_path / "x").read_bytes() == wholes[kind]


def test_a_merge_of_files_is_a_merge_of_what_was_written(bert: mb.Encoder, tmp_path: Path) -> None:
    adapters = trio(bert)
    for one in adapters:
        write_adapter(tmp_path / one.name, one)
    again = [read_adapter(tmp_path / one.name) for one in adapters]
    assert same_model(merge(again, "orthoada"), merge(adapters, "orthoada"))


def test_an_adapter_file_is_a_model(bert: mb.Encoder, tmp_path: Path) -> None:
    one = random_adapter(bert)
    write_model(tmp_path / "x", one)
    found = read_model(tmp_path / "x")
    assert isinstance(found, Adapter)
    assert same_adapter(found, one)


def test_adapters_that_share_their_tensors_can_be_kept_together(bert: mb.Encoder, tmp_path: Path) -> None:
    one = random_adapter(bert, basis="random", targets="qv")
    two = renamed(one, "other")
    for model in (merge([one, two], "ensemble"), merge([one, two], "task_arithmetic")):
        write_model(tmp_path / "x", model)
        assert same_model(read_model(tmp_path / "x"), model)


@pytest.mark.parametrize("kind", ["merged", "ensemble"])
def test_a_composition_is_no_adapter(path: Path, kind: str) -> None:
    with pytest.raises(ModelFileError, match=f"a file of kind '{kind}'; expected an adapter; give the adapters"):
        read_adapter(path)


B = f"site.{SITE}.B"
CORRUPTIONS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "merged, cut": ("merged", lambda path: os.truncate(path, path.stat().st_size - 9), "not readable"),
    "merged, of no known kind": ("merged", edit_metadata(lambda m: m.update(kind="soup")), "kind 'soup'"),
    "merged, without a record": (
        "merged",
        edit_metadata(lambda m: m.pop("merged")),
        "kind 'merged' with keys format, kind",
    ),
    "merged, of another format": ("merged", edit_metadata(lambda m: m.update(format=9)), "format version 9"),
    "merged, no factor": ("merged", edit_tensors(lambda t: t.pop(B)), f"'{B}' is missing"),
    "merged, no head": (
        "merged",
        edit_tensors(lambda t: t.pop("own.sts.head.classifier.bias")),
        "'own.sts.head.classifier.bias' is mis",
    ),
    "merged, more": ("merged", edit_tensors(lambda t: t.update(more=torch.ones(1))), "an extra tensor 'more'"),
    "merged, transposed": ("merged", edit_tensors(lambda t: t.update({B: t[B].T})), r"expected \(32, 9\)"),
    "merged, half": ("merged", edit_tensors(lambda t: t.update({B: t[B].half()})), "torch.float16"),
    "merged, NaN": ("merged", edit_tensors(lambda t: t[B].fill_(float("nan"))), f"'{B}' holds NaN"),
    "merged, no weights": ("merged", edit_metadata(lambda m: m["merged"].pop("weights")), "weights"),
    "merged, a weight too few": (
        "merged",
        edit_metadata(lambda m: m["merged"]["weights"].pop("sst")),
        "broken metadata.*sst",
    ),
    "merged, an extra key": ("merged", edit_metadata(lambda m: m["merged"].update(note=1)), "note"),
    "merged, a part without length": (
        "merged",
        edit_metadata(lambda m: m["merged"]["parts"]["sst"].pop("max_length")),
        "max_length",
    ),
    "merged, an endless length": (
        "merged",
        edit_metadata(lambda m: m["merged"]["parts"]["sst"].update(max_length="long")),
        "broken metadata",
    ),
    "merged, no part": (
        "merged",
        edit_metadata(lambda m: m["merged"].update(order=[], parts={})),
        "broken metadata|extra tensor",
    ),
    "merged, a part of another task": (
        "merged",
        edit_metadata(lambda m: m["merged"]["parts"]["sst"]["task"].update(name="cola")),
        "the part 'sst' is of another task",
    ),
    "merged, a size of three": (
        "merged",
        edit_metadata(lambda m: m["merged"]["sites"][SITE].update(size=[1, 2, 3])),
        "broken metadata",
    ),
    "dense, no matrix": ("dense", edit_tensors(lambda t: t.pop(f"site.{SITE}.dense")), "dense' is missing"),
    "ensemble, a router of tomorrow": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"].update(router="arrow")),
        "broken metadata .router: input should be 'task'",
    ),
    "ensemble, no expert": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"].update(order=[], experts={})),
        "broken metadata",
    ),
    "ensemble, another order": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"].update(order=["sst"])),
        "broken metadata",
    ),
    "ensemble, the order twice": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"].update(order=["sst", "sts", "para", "sst"])),
        "broken metadata",
    ),
    "ensemble, an extra key": ("ensemble", edit_metadata(lambda m: m["ensemble"].update(note=1)), "note"),
    "ensemble, more": ("ensemble", edit_tensors(lambda t: t.update(more=torch.ones(1))), "an extra tensor 'more'"),
    "ensemble, more of an expert": (
        "ensemble",
        edit_tensors(lambda t: t.update({"expert.sst.more": torch.ones(1)})),
        "an extra tensor 'more'",
    ),
    "ensemble, less of an expert": ("ensemble", edit_tensors(lambda t: t.pop(f"expert.sst.{B}")), f"'{B}' is missing"),
    "ensemble, an expert of another task": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"]["experts"]["sst"]["task"].update(name="cola")),
        "the expert 'sst' is of another task",
    ),
    "ensemble, an expert of another base": (
        "ensemble",
        edit_metadata(lambda m: m["ensemble"]["experts"]["sts"]["base"].update(fingerprint="0" * 64)),
        "the expert 'sts' is of another task or base",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for name, (kind, _, _) in CORRUPTIONS.items()])
def test_every_corruption_is_its_own_one_line_error(path: Path, kind: str, name: str) -> None:
    _, corrupt, message = CORRUPTIONS[name]
    corrupt(path)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@quick
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_flipped_bytes_are_refused(wholes: dict[str, bytes], tmp_path: Path, kind: str, data: st.DataObject) -> None:
    changed, path = bytearray(wholes[kind]), tmp_path / "model.safetensors"
    size = int.from_bytes(changed[:8], "little") + 8
    places = data.draw(st.sets(st.integers(0, size - 1) | st.integers(0, len(changed) - 1), min_size=1, max_size=3))
    for place in places:
        changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed[: data.draw(st.just(len(changed)) | st.integers(0, len(changed)))])
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    one_line(caught.value)


@pytest.mark.parametrize("kind", ["adapter", "merged", "ensemble"])
def test_files_that_earlier_versions_wrote_are_read(tmp_path: Path, kind: str) -> None:
    """The files were written before format 2: two LoRA adapters on one tiny BERT, and what was made of them."""
    found = read_model(Path(__file__).with_name("format_1") / f"{kind}.safetensors")
    assert [task.name for task in found.tasks] == (["sst"] if kind == "adapter" else ["sst", "sts"])
    for task in found.tasks:
        deltas = found.part(task.name).deltas.values()
        assert [delta.shape for delta in deltas] == [(32, 32), (32, 32)]
        assert {isinstance(delta, LowRank) for delta in deltas} == {kind != "merged"}
    write_model(tmp_path / "x", found)
    assert same_model(read_model(tmp_path / "x"), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_format_1_is_read_and_written_anew_in_format_2(
    models: dict[str, Any], wholes: dict[str, bytes], path: Path, kind: str
) -> None:
    as_format_1(path)
    found = read_model(path)
    assert same_model(found, models[kind])
    write_model(path, found)
    assert path.read_bytes() == wholes[kind]


def test_no_odd_value_in_the_metadata_is_a_traceback(bert: mb.Encoder, tmp_path: Path) -> None:
    adapters = [random_adapter(bert, task, start=start, targets=ONE) for task, start in (("para", 0), ("sts", 3))]
    for name, model in (("merged", merge(adapters, "fedavg")), ("ensemble", merge(adapters, "ensemble"))):
        write_model(tmp_path / name, model)
    try_odd_values(tmp_path / "merged", tmp_path / "ensemble")


def test_a_write_that_the_disk_garbles_is_told(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = model_file.read_tensors

    def garbled(path: Path, old: bool = False) -> tuple[dict[str, Tensor], Any]:
        found, metadata = true(path, old)
        found[B] = found[B] + 1e-6
        return found, metadata

    monkeypatch.setattr(model_file, "read_tensors", garbled)
    with pytest.raises(ModelFileError, match="what was read back differs"):
        write_model(tmp_path / "x", models["merged"])


def test_factors_stay_factors_on_disk(models: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "x", models["merged"])
    found = read_model(tmp_path / "x")
    assert isinstance(found, mb.Merged)
    assert {type(delta) for delta in found.deltas.values()} == {LowRank}
    assert {delta.rank for delta in found.deltas.values() if isinstance(delta, LowRank)} == {9}
