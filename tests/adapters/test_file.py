"""The adapter file: the same bytes for the same adapter, back as it was, and every corruption its own error."""

import dataclasses
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergekit_bert as mb
from mergekit_bert import files
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.patch import check_part
from mergekit_bert.encoder.load import Base, check_base
from mergekit_bert.errors import ModelFileError, OutputError
from mergekit_bert.files import canonical_json
from mergekit_bert.tensorfile import METADATA_KEY, _container, _values_sha256, read_tensors
from tests.adapters.helpers import (
    as_format_1,
    edit_metadata,
    edit_tensors,
    one_line,
    quick,
    random_adapter,
    read_raw,
    same_adapter,
    try_odd_values,
    write_raw,
)

SITE = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def adapter(bert: mb.Encoder) -> Adapter:
    return random_adapter(bert, targets="qv", train_layernorm=True)


@pytest.fixture(scope="module")
def whole(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("adapter") / "sst.safetensors"
    write_adapter(path, adapter)
    return path.read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    found = tmp_path / "sst.safetensors"
    found.write_bytes(whole)
    return found


@pytest.mark.parametrize("options", [{}, {"basis": "random"}, {"train_bias": True, "train_layernorm": True}])
@pytest.mark.parametrize("task", ["sst", "sts", "para"])
@pytest.mark.parametrize("kind", FAMILIES.names())
def test_an_adapter_comes_back_as_it_was(
    bert: mb.Encoder, tmp_path: Path, kind: str, task: str, options: dict[str, Any]
) -> None:
    one = random_adapter(bert, task, kind=kind, **options)
    write_adapter(tmp_path / "x.safetensors", one)
    two = read_adapter(tmp_path / "x.safetensors")
    assert same_adapter(one, two)
    values = {name: getattr(two, name) for name in ("tensors", "shifts", "head", "extras")}
    assert two == dataclasses.replace(one, task=dataclasses.replace(one.task, hub=None), **values)


def test_the_same_adapter_gives_the_same_bytes(adapter: Adapter, whole: bytes, tmp_path: Path) -> None:
    turned = dataclasses.replace(
        adapter,
        sites=dict(reversed(adapter.sites.items())),
        tensors={site: dict(reversed(one.items())) for site, one in reversed(adapter.tensors.items())},
        head=dict(reversed(adapter.head.items())),
        shifts={name: value.clone() for name, value in reversed(adapter.shifts.items())},
    )
    write_adapter(tmp_path / "x.safetensors", turned)
    assert (tmp_path / "x.safetensors").read_bytes() == whole
    write_adapter(tmp_path / "y.safetensors", read_adapter(tmp_path / "x.safetensors"))
    assert (tmp_path / "y.safetensors").read_bytes() == whole
    assert turned.sha256() == files.file_fingerprint(tmp_path / "x.safetensors")


def test_rows_of_the_basis_are_not_stored_and_yet_read(adapter: Adapter, path: Path) -> None:
    names = set(read_raw(path)[0]) - {"__metadata__"}
    assert f"site.{SITE}.B" in names
    assert not any(name.endswith(".A") for name in names)
    for site, values in read_adapter(path).tensors.items():
        assert torch.equal(values["A"], adapter.tensors[site]["A"])


def test_trained_factors_are_stored(bert: mb.Encoder, tmp_path: Path) -> None:
    write_adapter(tmp_path / "x.safetensors", random_adapter(bert, targets="qv", basis="random"))
    assert f"site.{SITE}.A" in read_raw(tmp_path / "x.safetensors")[0]


def test_the_metadata_is_one_sorted_key(path: Path) -> None:
    metadata = read_raw(path)[0]["__metadata__"]
    assert list(metadata) == ["mbert"]
    assert metadata["mbert"] == files.canonical_json(json.loads(metadata["mbert"]))


def record(**changes: object) -> Callable[[Path], None]:
    """New values of keys of the adapter's record, by ``key`` or ``key__inner``."""

    def change(metadata: dict[str, Any]) -> None:
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = metadata["adapter"]
            for key in outer:
                place = place[key]
            place[last] = value

    return edit_metadata(change)


def fill(name: str, value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda found: found[name].view(-1)[-1:].fill_(value))


B = f"site.{SITE}.B"
CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not readable as safetensors"),
    "cut in the header": (lambda path: os.truncate(path, 100), "not readable as safetensors"),
    "cut in the data": (lambda path: os.truncate(path, path.stat().st_size - 1), "not readable as safetensors"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"), "not readable as safetensors"),
    "a pickle": (lambda path: torch.save({"a": 1}, path), "not readable as safetensors"),
    "gone": (lambda path: path.unlink(), "no such file"),
    "foreign": (lambda path: write_raw(path, {"__metadata__": {"format": "pt"}}, b""), "a foreign header"),
    "without metadata": (lambda path: write_raw(path, {}, b""), "a foreign header .metadata keys: none"),
    "not JSON": (lambda path: write_raw(path, {"__metadata__": {"mbert": "{"}}, b""), "broken metadata"),
    "a list": (lambda path: write_raw(path, {"__metadata__": {"mbert": "[]"}}, b""), "metadata that is a list"),
    "a newer format": (edit_metadata(lambda m: m.update(format=3)), "format version 3; expected version 1 or 2"),
    "no format": (edit_metadata(lambda m: m.pop("format")), "format version None"),
    "an unknown kind": (edit_metadata(lambda m: m.update(kind="soup")), "a file of kind 'soup'; expected an adapter"),
    "no kind": (edit_metadata(lambda m: m.pop("kind")), "a file of kind 'None'"),
    "no record": (edit_metadata(lambda m: m.pop("adapter")), "metadata keys format, kind; expected"),
    "an extra outer key": (edit_metadata(lambda m: m.update(note=1)), "keys .*note; expected format, kind and adapter"),
    "a missing key": (edit_metadata(lambda m: m["adapter"].pop("head")), "broken metadata .head: field required"),
    "an extra key": (record(colour="red"), "broken metadata .colour: extra inputs are not permitted"),
    "a record that is a list": (edit_metadata(lambda m: m.update(adapter=[])), "broken metadata"),
    "a missing tensor": (edit_tensors(lambda t: t.pop(B)), f"tensor '{B}' is missing"),
    "a missing head": (edit_tensors(lambda t: t.pop("head.classifier.bias")), "'head.classifier.bias' is missing"),
    "an extra tensor": (edit_tensors(lambda t: t.update(more=torch.ones(1))), "an extra tensor 'more'"),
    "stored rows": (edit_tensors(lambda t: t.update({f"site.{SITE}.A": torch.ones(3, 32)})), "an extra tensor"),
    "a wrong shape": (
        edit_tensors(lambda t: t.update({B: torch.ones(3, 32)})),
        r"is \(3, 32\) torch.float32; expected \(32, 3",
    ),
    "float16": (edit_tensors(lambda t: t.update({B: t[B].half()})), "torch.float16; expected"),
    "float64": (edit_tensors(lambda t: t.update({B: t[B].double()})), "torch.float64; expected"),
    "integers": (edit_tensors(lambda t: t.update({B: t[B].int()})), "torch.int32; expected"),
    "8 bits": (edit_tensors(lambda t: t.update({B: t[B].to(torch.float8_e4m3fn)})), "torch.float8_e4m3fn; expected"),
    "NaN": (fill(B, float("nan")), f"tensor '{B}' holds NaN"),
    "infinity": (fill("head.classifier.bias", float("inf")), "tensor 'head.classifier.bias' holds NaN or values"),
    "an unknown type": (record(type="loha9"), "'loha9'.*expected"),
    "another rank": (record(config__rank=4), "broken metadata|is .32, 3."),
    "an unknown option": (record(config__colour=1), "broken metadata.*colour"),
    "an option out of range": (record(config__dropout=7.0), "broken metadata.*`dropout`"),
    "a size of one number": (record(sites={SITE: [32]}), "broken metadata"),
    "a size that is no number": (record(sites={SITE: ["wide", 32]}), "broken metadata"),
    "an endless size": (record(sites={SITE: [float("inf"), 32]}), "broken metadata"),
    "an endless length": (record(max_length=float("inf")), "broken metadata"),
    "fewer rows than the rank": (record(basis__count=2), "2 basis rows"),
    "rows beyond the width": (record(basis__start=31), "has 32 input features"),
    "rows before the first": (record(basis__start=-1), "broken metadata"),
    "a task without a name": (record(task={"kind": "classify"}), "broken metadata"),
    "a task that contradicts itself": (record(task__labels=["0"]), "broken metadata.*two or more"),
    "a task with an unknown metric": (record(task__metrics=["luck"]), "broken metadata.*luck"),
    "a base without a fingerprint": (record(base={"name": "x"}), "broken metadata"),
    "a score that is no number": (record(scores={"f1": "high"}), "broken metadata"),
    "training that is no mapping": (record(training=3), "broken metadata"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_its_own_one_line_error(path: Path, name: str) -> None:
    corrupt, message = CORRUPTIONS[name]
    corrupt(path)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(path: Path, whole: bytes) -> None:
    for size in sorted({*range(0, len(whole), 97), 8, len(whole) - 1}):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            read_adapter(path)


def _refused(path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        read_adapter(path)
    one_line(caught.value)


@quick
@given(st.data())
def test_flipped_bytes_are_refused(path: Path, whole: bytes, data: st.DataObject) -> None:
    changed = bytearray(whole)
    size = int.from_bytes(whole[:8], "little") + 8
    places = data.draw(st.sets(st.integers(0, size - 1) | st.integers(0, len(whole) - 1), min_size=1, max_size=4))
    for place in places:
        changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    _refused(path)


def test_every_single_bit_of_the_header_counts(path: Path, whole: bytes) -> None:
    size = int.from_bytes(whole[:8], "little") + 8
    for place in range(0, size, 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        _refused(path)


@quick
@given(st.data())
def test_bytes_put_in_or_taken_out_are_refused(path: Path, whole: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 50)))
    changed = whole[:start] + data.draw(st.binary(max_size=50)) + whole[stop:]
    path.write_bytes(changed)
    if changed != whole:
        _refused(path)


def test_a_file_of_format_1_is_read_and_written_anew_in_format_2(path: Path, whole: bytes, adapter: Adapter) -> None:
    as_format_1(path)
    assert b'"format\\":1' in path.read_bytes()
    found = read_adapter(path)
    assert same_adapter(found, adapter)
    write_adapter(path, found)
    assert path.read_bytes() == whole


def test_format_2_cannot_pass_for_format_1(path: Path) -> None:
    tensors, metadata = read_tensors(path)
    as_format_1(path)
    for claimed in (2, 1.0, "1", True):
        text = canonical_json({**metadata, "format": claimed, "sha256": _values_sha256(tensors)})
        path.write_bytes(b"".join(_container(tensors, {METADATA_KEY: text})))
        _refused(path)


@pytest.mark.parametrize("width", [2**17, 2**20, 2**31, 2**63])
def test_sizes_that_no_tensor_bears_out_are_refused_before_memory_is_taken(path: Path, width: int) -> None:
    edit_metadata(lambda metadata: metadata["adapter"]["sites"].update({SITE: [32, width]}))(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


def test_no_odd_value_in_the_metadata_is_a_traceback(bert: mb.Encoder, tmp_path: Path) -> None:
    one = random_adapter(bert, "para", targets="pooler.dense", train_layernorm=True)
    write_adapter(tmp_path / "x.safetensors", dataclasses.replace(one, shifts=dict(list(one.shifts.items())[:1])))
    try_odd_values(tmp_path / "x.safetensors")


def test_another_base_is_told(adapter: Adapter, bert: mb.Encoder, encoders: dict[str, mb.Encoder]) -> None:
    check_base("x", adapter.base, bert)
    with pytest.raises(ModelFileError, match=r"x: made for base .*expected base .*the `base` it was trained on"):
        check_base("x", adapter.base, encoders["minilm"])


def test_another_tokenizer_is_told(adapter: Adapter, bert: mb.Encoder) -> None:
    other = dataclasses.replace(bert, tokenizer_fingerprint="0" * 64)
    with pytest.raises(ModelFileError, match=r"another tokenizer .*expected the tokenizer of .*\(000000000000\)"):
        check_base("x", adapter.base, other)
    assert Base.of(bert) == adapter.base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deltas": "site"}, "site elsewhere has shape .*nothing there"),
        ({"deltas": "shape"}, f"site {SITE} has shape"),
        ({"shifts": {"elsewhere": torch.zeros(1)}}, "shift elsewhere has shape .*nothing there"),
        ({"shifts": {"pooler.dense.bias": torch.zeros(3)}}, "shift pooler.dense.bias has shape"),
        ({"head": {}}, "no head classifier"),
        (
            {"head": {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(5)}},
            r"has shape \(2, 32\)",
        ),
        (
            {
                "head": {
                    "classifier.weight": torch.zeros(5, 32),
                    "classifier.bias": torch.zeros(5),
                    "more": torch.zeros(1),
                }
            },
            "head more has shape",
        ),
    ],
)
def test_a_part_that_does_not_fit_the_encoder_is_told(
    adapter: Adapter, bert: mb.Encoder, encoders: dict[str, mb.Encoder], change: dict[str, Any], message: str
) -> None:
    part = adapter.part("sst")
    check_part("x", part, bert)
    if change == {"deltas": "site"}:
        change = {"deltas": {"elsewhere": part.deltas[SITE]}}
    elif change == {"deltas": "shape"}:
        change = {"deltas": random_adapter(encoders["minilm"], targets="qv").deltas()}
    with pytest.raises(ModelFileError, match=message):
        check_part("x", dataclasses.replace(part, **change), bert)


def test_a_full_disk_leaves_the_old_adapter(
    path: Path, whole: bytes, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="no space left on device"):
        write_adapter(path, random_adapter(bert, seed=1))
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


_WRITER = """
import sys
from pathlib import Path
from mergekit_bert.tensorfile import read_tensors, write_tensors
target, *sources = map(Path, sys.argv[1:])
contents = [read_tensors(source) for source in sources]
print("ready", flush=True)
while True:
    for tensors, metadata in contents:
        write_tensors(target, tensors, metadata)
"""


def test_a_killed_writer_leaves_one_of_the_adapters(bert: mb.Encoder, tmp_path: Path) -> None:
    folder, chance = tmp_path / "adapters", random.Random(1)
    known = {}
    for seed in (1, 2):
        one = random_adapter(bert, seed=seed)
        write_adapter(tmp_path / f"{seed}.safetensors", one)
        known[one.sha256()] = one
    target = folder / "sst.safetensors"
    sources = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(target), *sources], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(chance.uniform(0.01, 0.05))
            writer.send_signal(signal.SIGKILL)
        if target.exists():
            assert same_adapter(read_adapter(target), known[files.file_fingerprint(target)])
    write_adapter(target, one)
    assert os.listdir(folder) == [target.name]


def test_inspection_needs_no_base(path: Path, adapter: Adapter) -> None:
    found = read_adapter(path).pack()[1]
    assert found["base"]["fingerprint"] == adapter.base.fingerprint
    assert found["basis"] == BasisRows(0, 0, 3).to_json()
    assert found["sites"][SITE] == [32, 32]
    assert np.isclose(found["scores"]["held_out"], 0.5)
