"""PEFT folders from strangers: whatever is wrong in one ends in one line, without reading a value where names tell."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Dense
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.patch import TaskSpecific
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import head_shapes
from mergekit_bert.encoder.load import Base, Encoder
from mergekit_bert.encoder.sites import linear_layers
from mergekit_bert.errors import CompositionError, MbertError, ModelFileError
from mergekit_bert.formats.peft import CONFIG, WEIGHTS, LoraConfig
from mergekit_bert.formats.peft_format import read_peft, write_peft
from mergekit_bert.formats.peft_reading import _LARGEST, _check_sizes
from mergekit_bert.hardware import generator
from mergekit_bert.models.composition import Merged
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.tensorfile import StoredTensors
from tests.adapters.helpers import random_adapter, read_raw, write_raw
from tests.adapters.odd_values import GONE, places, put
from tests.formats.peft_folders import M, Q, edit, make, tensors
from tests.hang import HANGS, in_time
from tests.tiny import tiny_rows

RECORD = "mbert.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def foreign(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEFT's own."""
    path = tmp_path_factory.mktemp("foreign") / "sst"
    make(path, tiny_folders["bert"], get_task("sst"), target_modules=["query"], bias="all")
    return path


@pytest.fixture(scope="module")
def written(bert: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that mbert wrote."""
    path = tmp_path_factory.mktemp("written") / "sst"
    write_peft(path, random_adapter(bert, targets=r".*\.query"), bert)
    return path


def refused(path: Path, encoder: Encoder, kind: type[MbertError] = ModelFileError, message: str = ".") -> None:
    """Check that the folder is refused, in one short line that nothing can steer."""
    with in_time(), pytest.raises(kind, match=message) as caught:
        read_peft(path, encoder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500


SETTINGS: dict[str, dict[str, Any]] = {
    "a base that is a list": {"base_model_name_or_path": ["a", "b"]},
    "a base that steers": {"base_model_name_or_path": "a\x1b[2Jb"},
    "a base that is half a pair": {"base_model_name_or_path": "\udc80"},
    "a revision that is a number": {"revision": 3},
    "a rank that is true": {"r": True},
    "a rank of a fraction": {"r": 3.0},
    "a rank beyond 64 bits": {"r": 2**64},
    "a huge rank": {"r": 2**40},
    "a negative rank": {"r": -3},
    "no alpha": {"lora_alpha": 0},
    "a negative alpha": {"lora_alpha": -1.0},
    "a huge alpha": {"lora_alpha": 1e300},
    "alpha in a list": {"lora_alpha": [5]},
    "alpha as a text": {"lora_alpha": "5"},
    "a nested alpha": {"alpha_pattern": {"query": {"query": 1}}},
    "a huge alpha in a pattern": {"alpha_pattern": {"query": 1e300}},
    "alpha 0 in a pattern": {"alpha_pattern": {"query": 0}},
    "a rank as a text in a pattern": {"rank_pattern": {"query": "3"}},
    "rank 0 in a pattern": {"rank_pattern": {"query": 0}},
    "a huge rank in a pattern": {"rank_pattern": {"query": 2**30}},
    "another rank in a pattern": {"rank_pattern": {"query": 4}},
    "patterns in a list": {"rank_pattern": [["query", 3]]},
    "a broken pattern": {"rank_pattern": {"(": 3}},
    "lookaround": {"alpha_pattern": {"(?!x)query": 3}},
    "too many patterns": {"alpha_pattern": {f"x{n}": 1 for n in range(5000)}},
    "a pattern too long": {"alpha_pattern": {"x" * 10**5: 1}},
    "rsLoRA by a text": {"use_rslora": "no"},
    "DoRA by a number": {"use_dora": 1},
    "all dropped": {"lora_dropout": 1.0},
    "less than nothing dropped": {"lora_dropout": -0.5},
    "targets that are a number": {"target_modules": 3},
    "targets that are numbers": {"target_modules": [3]},
    "targets that steer": {"target_modules": ["query\x07"]},
    "a target pattern that is broken": {"target_modules": "("},
    "a target pattern that looks around": {"target_modules": ".*(?<=query)"},
    "a target pattern of no site": {"target_modules": HANGS},
    "an excluding pattern that is broken": {"exclude_modules": "*"},
    "what is there excluded": {"exclude_modules": ["query"]},
    "what is there saved whole": {"modules_to_save": ["classifier", "query"]},
    "a module to save that is a text": {"modules_to_save": "classifier"},
    "layers that are texts": {"layers_to_transform": ["0"]},
    "a layer pattern that is a number": {"layers_pattern": 3},
    "a target without LoRA": {"target_modules": ["query", "value"]},
    "every target": {"target_modules": "all-linear"},
    "another target": {"target_modules": ["value"]},
    "another task type that steers": {"task_type": "\x9b"},
    "a record that steers": {"auto_mapping": {"a": ["\x1b"]}},
}


SAID = {
    "a base that is half a pair": "$^",
    "lookaround": "neither lookaround nor backreferences",
    "a target pattern that looks around": "neither lookaround nor backreferences",
    "a broken pattern": "missing",
    "a target pattern that is broken": "missing",
    "an excluding pattern that is broken": "nothing to repeat",
    "too many patterns": "too many patterns",
    "a pattern too long": "100000 characters",
}
"""What is said where it is not the name of the setting."""
NO_LORA = "LoRA at 'bert.encoder.layer.0.attention.self.query'; expected none, by target_modules"
UNLIKE = {
    "a base that is half a pair": "half of a surrogate pair",
    "a rank beyond 64 bits": "a number of 20 digits",
    "another rank in a pattern": r"B \(32, 3\)}; expected {A \(4, 32\)",
    "a target pattern of no site": NO_LORA,
    "what is there excluded": NO_LORA,
    "what is there saved whole": NO_LORA,
    "another target": NO_LORA,
    "a target without LoRA": "no LoRA at '.*value'; expected some, by target_modules",
    "every target": "no LoRA at '.*key'; expected some, by target_modules",
}
"""What is said of settings that the file may hold, were the others others."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_refused(foreign: Path, bert: Encoder, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))
    edit(**SETTINGS[name])(path)
    key = next(iter(SETTINGS[name]))
    refused(path, bert, message=rf"{CONFIG}: broken \((?!--).*{SAID.get(name, key)}|{UNLIKE.get(name, '$^')}")


TEXTS: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"r": 3, "r": 4}', "'r' twice"),
    "an endless number": (b'{"r": ' + b"9" * 10_000 + b"}", "digits"),
    "a number that is infinite": (b'{"r": 3, "lora_alpha": 1e999}', "1e999"),
    "NaN": (b'{"r": NaN}', "NaN"),
    "nested without end": (b'{"r": ' + b"[" * 100_000, "nested|deep"),
    "no UTF-8": (b'{"r": "\xff"}', "UTF-8"),
    "nothing": (b"", "not JSON"),
    "a huge file": (b" " * (9 * 2**20), "more than 8,388,608 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", [CONFIG, RECORD])
def test_a_file_that_is_no_plain_json_is_refused(
    written: Path, bert: Encoder, tmp_path: Path, file: str, name: str
) -> None:
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    data, message = TEXTS[name]
    (path / file).write_bytes(data)
    refused(path, bert, message=f"{file}.*({message})")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    kept = path.rename(path.with_name("kept"))
    path.mkdir()
    kept.rename(path / "model.safetensors")


@pytest.mark.parametrize("change", [fifo, folder])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, RECORD])
def test_what_is_no_regular_file_is_not_opened(
    written: Path, bert: Encoder, tmp_path: Path, file: str, change: Callable[[Path], None]
) -> None:
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    change(path / file)
    refused(path, bert, message=file)


def test_links_to_regular_files_are_followed(foreign: Path, bert: Encoder, tmp_path: Path) -> None:
    (tmp_path / "sst").mkdir()
    for file in foreign.iterdir():
        (tmp_path / "sst" / file.name).symlink_to(file)
    assert read_peft(tmp_path / "sst", bert).tasks[0].name == "sst"


def swapped(name: str, value: Tensor) -> Change:
    """Another tensor at a place of the encoder or the head."""
    return tensors(lambda found: found.update({f"{M}{name}": value}))


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of the header alone."""

    def run(path: Path) -> None:
        found, data = read_raw(path / WEIGHTS)
        change(found)
        write_raw(path / WEIGHTS, found, data)

    return run


def together(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


WORDS = "bert.embeddings.word_embeddings"
MISFITS: dict[str, tuple[Change, str]] = {
    "too wide a factor": (swapped(f"{Q[len(M) :]}.lora_A.weight", torch.ones(3, 33)), "A .3, 33.*expected .A .3, 32."),
    "factors of another rank": (swapped(f"{Q[len(M) :]}.lora_B.weight", torch.ones(32, 4)), "B .32, 4."),
    "a factor that is a vector": (swapped(f"{Q[len(M) :]}.lora_B.weight", torch.ones(96)), "B .96,."),
    "a factor of nothing": (swapped(f"{Q[len(M) :]}.lora_A.weight", torch.ones(0, 2**40)), "A .0, 1099511627776."),
    "magnitudes without DoRA": (swapped(f"{Q[len(M) :]}.lora_magnitude_vector", torch.ones(32)), "m .32,."),
    "magnitudes of another width": (
        together(
            edit(use_dora=True),
            swapped(f"{Q[len(M) :]}.lora_magnitude_vector", torch.ones(31)),
            swapped(f"{Q[len(M) :].replace('.0.', '.1.')}.lora_magnitude_vector", torch.ones(32)),
        ),
        "m .31,.",
    ),
    "a third factor": (swapped(f"{Q[len(M) :]}.lora_C.weight", torch.ones(3)), "lora_C.weight' of shape"),
    "embeddings of another size": (swapped(f"{WORDS}.weight", torch.ones(99, 32)), r"weight' of shape \(99, 32\)"),
    "a bias of another size": (swapped("bert.pooler.dense.bias", torch.ones(33)), r"bias' of shape \(33,\)"),
    "an original of another size": (swapped("classifier.original_module.bias", torch.ones(9)), "original_module"),
    "a copy of nothing": (swapped("bert.x.modules_to_save.default.bias", torch.ones(9)), "modules_to_save"),
    "a weight beside its LoRA": (swapped(f"{Q[len(M) :]}.weight", torch.ones(32, 32)), "beside LoRA"),
    "a weight under its LoRA": (swapped(f"{Q[len(M) :]}.base_layer.weight", torch.ones(32, 32)), "beside LoRA"),
    "one bias twice": (swapped(f"{Q[len(M) :]}.bias", torch.ones(32)), "one tensor for each place"),
    "an encoder without its prefix": (swapped("embeddings.LayerNorm.bias", torch.ones(32)), "LayerNorm.bias"),
    "another prefix": (tensors(lambda t: t.update({"x." + Q + ".lora_A.weight": torch.ones(3, 32)})), "x.base_model"),
    "a head of another width": (swapped("classifier.weight", torch.ones(5, 33)), r"classifier.weight' of shape"),
    "a name that steers": (swapped("bert.\x1b[2J", torch.ones(2)), r"x1b"),
    "a name without end": (swapped("bert." + "x" * 10**5, torch.ones(2)), "xxx"),
    "a part of another layer": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": t.pop(f"{Q.replace('.0.', '.1.')}.lora_A.weight")})),
        r"are \{B \(32, 3\)\}",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told_before_a_value_is_read(
    foreign: Path, bert: Encoder, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))
    change, message = MISFITS[name]
    change(path)

    def read(stored: StoredTensors, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(StoredTensors, "__getitem__", read)
    refused(path, bert, message=message)


VALUES: dict[str, tuple[Change, str]] = {
    "NaN in a factor": (tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.nan)), "NaN or values beyond"),
    "infinity in a head": (tensors(lambda t: t[f"{M}classifier.bias"].fill_(torch.inf)), "NaN or values beyond"),
    "whole numbers": (swapped(f"{Q[len(M) :]}.lora_A.weight", torch.ones(3, 32, dtype=torch.int64)), "of torch.int64"),
    "truths": (swapped("classifier.bias", torch.ones(5, dtype=torch.bool)), "of torch.bool"),
    "8 bits": (swapped(f"{Q[len(M) :]}.lora_A.weight", torch.ones(3, 32).to(torch.float8_e4m3fn)), "float8"),
    "beyond float32": (
        swapped(f"{Q[len(M) :]}.lora_A.weight", torch.full((3, 32), 1e300, dtype=torch.float64)),
        r"holds NaN or values beyond 1e\+18",
    ),
    "a product that is infinite": (
        tensors(lambda t: [t[f"{Q}.lora_{letter}.weight"].fill_(1e10) for letter in "AB"]),
        r"query' is changed by \S+ .Frobenius norm.; expected 10000 at most, for finite answers",
    ),
    "a scale that is too large": (edit(lora_alpha=1e6), "query' is changed by"),
    "a bias that is too large": (swapped("bert.pooler.dense.bias", torch.full((32,), 1e5)), "pooler.dense.bias' is ch"),
    "a head that is too large": (swapped("classifier.weight", torch.full((5, 32), 1e10)), "classifier.weight' is ch"),
    "a copy of other values": (
        swapped("classifier.modules_to_save.default.bias", torch.full((5,), 0.25)),
        "modules_to_save.default.bias' differs from .*classifier.bias'",
    ),
    "a header that promises more": (
        header(lambda found: found[f"{Q}.lora_A.weight"].update(shape=[2**40, 32])),
        "not readable as safetensors",
    ),
    "a header beyond the file": (
        lambda path: (path / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        "not readable as safetensors",
    ),
    "bytes that overlap": (
        header(lambda found: found.update(copy=dict(found[f"{Q}.lora_A.weight"]))),
        "not readable as safetensors",
    ),
    "a type of nobody's": (
        header(lambda found: found[f"{Q}.lora_A.weight"].update(dtype="Q7")),
        "not readable as safetensors",
    ),
    "bytes of no tensor": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"\0" * 100),
        "not readable as safetensors",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_cannot_be_are_refused(foreign: Path, bert: Encoder, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))
    change, message = VALUES[name]
    change(path)
    refused(path, bert, message=message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_is_read_as_its_values(
    foreign: Path, bert: Encoder, tmp_path: Path, dtype: torch.dtype
) -> None:
    exact, path = read_peft(foreign, bert), Path(shutil.copytree(foreign, tmp_path / "sst"))
    tensors(lambda found: found.update({name: one.to(dtype) for name, one in found.items()}))(path)
    found = read_peft(path, bert)
    assert isinstance(found, Adapter)
    assert isinstance(exact, Adapter)
    for site, one in exact.tensors.items():
        for letter, value in one.items():
            assert torch.equal(found.tensors[site][letter], value.to(dtype).float())


def test_originals_and_true_copies_are_no_tensors_of_their_own(foreign: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))

    def copies(found: dict[str, Tensor]) -> None:
        found[f"{M}classifier.original_module.bias"] = torch.ones(5)
        found[f"{M}classifier.modules_to_save.default.bias"] = found[f"{M}classifier.bias"].clone()

    tensors(copies)(path)
    one, two = read_peft(foreign, bert), read_peft(path, bert)
    assert isinstance(one, Adapter)
    assert isinstance(two, Adapter)
    assert one.sha256() == two.sha256()


def test_a_pattern_of_a_folder_cannot_hang(foreign: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))
    edit(rank_pattern={HANGS: 5}, alpha_pattern={HANGS: 5.0})(path)
    with in_time():
        found = read_peft(path, bert)
    assert isinstance(found, Adapter)
    assert {found.config.at(site).rank for site in found.sites} == {3}


def test_the_order_of_patterns_is_that_of_the_file(foreign: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(foreign, tmp_path / "sst"))
    value = json.loads((path / CONFIG).read_text())
    for patterns, alpha in ({"self.query": 2, "query": 7}, 2), ({"query": 7, "self.query": 2}, 7):
        (path / CONFIG).write_text(json.dumps(value | {"alpha_pattern": patterns}))
        found = read_peft(path, bert)
        assert isinstance(found, Adapter)
        assert {found.config.at(site).alpha for site in found.sites} == {alpha}


TOLD: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "another version": (("format",), 2, "format: "),
    "another kind": (("kind",), "adapter", "kind: "),
    "a task that is none": (("task",), "sst", "task: "),
    "a text that is a number": (("task", "text"), 3, "task.text: "),
    "a label that steers": (("task", "labels"), ["\x1b", "b"], r"labels is '\\x1b'"),
    "a head of other labels": (("task", "labels"), [f"{n}" for n in range(7)], "label_names is"),
    "rows of somebody's": (("task", "hub"), {"path": "a"}, "task.hub: where the rows"),
    "a negative length": (("max_length",), -1, "max_length: "),
    "a length beyond 64 bits": (("max_length",), 2**63, "max_length: "),
    "a length that is a text": (("max_length",), "x", "max_length: "),
    "a base without a name": (("base", "name"), None, "base.name: "),
    "a base that is a list": (("base", "name"), ["a"], "base.name: "),
    "a base that steers": (("base", "name"), "a\x9bb", "base.name: .*control characters"),
    "no fingerprint": (("base", "fingerprint"), "x", "base.fingerprint: "),
    "a foreign base": (("base", "fingerprint"), "0" * 64, "made for base"),
    "no checksum": (("sha256",), None, "sha256: "),
    "targets that are a list": (("adapter", "config", "targets"), ["query"], "adapter.config: targets: "),
    "a rank that is a text": (("adapter", "config", "rank"), "3", "adapter.config: rank: "),
    "another rank": (("adapter", "config", "rank"), 4, "mbert.json: another rank of"),
    "another alpha": (("adapter", "config", "alpha"), 4.5, "mbert.json: another alpha of"),
    "another scale": (("adapter", "config", "rank_stabilized"), True, "mbert.json: another rank_stabilized of"),
    "a pattern that is none": (("adapter", "config", "alpha_pattern"), [["(", 1]], "missing"),
    "another alpha in a pattern": (("adapter", "config", "alpha_pattern"), [["query", 1]], "another alpha of"),
    "rows that are a list": (("adapter", "basis"), [0, 0, 3], "adapter.basis: "),
    "rows of another seed": (("adapter", "basis", "seed"), 1, "mbert.json: another basis of"),
    "other rows": (("adapter", "basis", "start"), 1, "mbert.json: another basis of"),
    "fewer rows": (("adapter", "basis", "count"), 2, "mbert.json: another basis of"),
    "rows beyond the site": (("adapter", "basis", "start"), 2**30, "mbert.json: another basis of"),
    "a score that is a text": (("adapter", "scores"), {"held_out": "1"}, "adapter.scores.held_out: "),
    "scores that are a list": (("adapter", "scores"), [], "adapter.scores: "),
    "training that is a list": (("adapter", "training"), [], "adapter.training: "),
    "training that steers": (
        ("adapter", "training"),
        {"optimizer": "\x1b[2J"},
        "adapter.training.optimizer: text should have no control",
    ),
    "something more": (("adapter", "more"), 1, "adapter.more: "),
    "something more beside": (("more",), 1, "more: "),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_record_that_cannot_be_is_refused(written: Path, bert: Encoder, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    place, value, message = TOLD[name]
    (path / RECORD).write_text(json.dumps(put(json.loads((path / RECORD).read_text()), place, value)))
    refused(path, bert, MbertError, message)


def test_the_record_of_a_folder_that_changed_is_not_believed(written: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    edit(lora_alpha=7)(path)
    found = read_peft(path, bert)
    assert isinstance(found, Adapter)
    assert (found.config.alpha, found.basis) == (7.0, None)


def test_labels_that_are_not_the_heads_are_told(written: Path, bert: Encoder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    value = json.loads((path / RECORD).read_text())
    value["task"] |= {"labels": list("abcdefg"), "label_names": []}
    (path / RECORD).write_text(json.dumps(value))
    refused(path, bert, CompositionError, "a head of 5 outputs; expected 7")


ODD: tuple[Any, ...] = (None, True, -1, 2**40, 1e300, "", "x", "\udc80", ["x"], {"x": 1}, GONE)


@pytest.mark.parametrize("file", [CONFIG, RECORD])
def test_no_odd_value_is_a_traceback(
    written: Path, bert: Encoder, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = Path(shutil.copytree(written, tmp_path / "sst"))
    value = json.loads((path / file).read_text())
    stopped = taken = 0
    for place in places(value):
        for odd in ODD:
            (path / file).write_text(json.dumps(put(value, place, odd)))
            try:
                found = read_peft(path, bert)
            except MbertError as error:
                assert str(error).isprintable(), (place, odd)  # noqa: PT017
                stopped += 1
                continue
            assert isinstance(found, Adapter)
            write_adapter(tmp_path / "back.safetensors", found)
            read_adapter(tmp_path / "back.safetensors")
            taken += 1
    assert stopped > 3 * taken > 0


WORD = st.sampled_from(["query", "key", "self.query", "dense", "output.dense", "layer", "0", "bert.encoder.layer.0.x"])
NAME = st.lists(st.sampled_from(["bert", "layer", "0", "1", "self", "query", "output", "dense", "x"]), max_size=6).map(
    ".".join
)
WORDS_OR_PATTERN = st.lists(WORD, min_size=1, max_size=3) | st.sampled_from(
    [".*query", r".*\.(query|key)", "query", "bert.*", r".*\.\d\..*dense", "all"]
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(WORDS_OR_PATTERN, st.none() | WORDS_OR_PATTERN, st.none() | st.lists(WORD, max_size=2), NAME)
def test_targets_are_chosen_as_peft_chooses(targets: Any, without: Any, saved: Any, name: str) -> None:
    theirs = peft.LoraConfig(target_modules=targets, exclude_modules=without, modules_to_save=saved)
    ours = LoraConfig(peft_type="LORA", r=3, target_modules=targets, exclude_modules=without, modules_to_save=saved)
    found = check_target_module_exists(theirs, name)
    assert ours.targets(name) == (bool(found) and type(found).__name__ != "_ExcludedModule")


def test_a_layer_saved_whole_and_unchanged_is_no_change(
    tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path
) -> None:
    options = {"target_modules": ["query"], "modules_to_save": ["intermediate.dense"]}
    make(tmp_path / "sst", tiny_folders["bert"], get_task("sst"), **options)
    assert isinstance(read_peft(tmp_path / "sst", bert), Merged)
    for layer in (0, 1):
        for name in ("weight", "bias"):
            place = f"encoder.layer.{layer}.intermediate.dense.{name}"
            swapped(f"bert.{place}", bert.model.get_parameter(place).clone())(tmp_path / "sst")
    found = read_peft(tmp_path / "sst", bert)
    assert isinstance(found, Adapter)
    assert {site.rpartition(".")[2] for site in found.deltas()} == {"query"}


def test_layers_that_peft_leaves_out_may_lack(tiny_folders: dict[str, Path], bert: Encoder, tmp_path: Path) -> None:
    make(tmp_path / "sst", tiny_folders["bert"], get_task("sst"), target_modules=["query"], layers_to_transform=[1])
    assert list(read_peft(tmp_path / "sst", bert).part("sst").deltas) == ["encoder.layer.1.attention.self.query"]


def test_at_the_largest_size_all_answers_are_finite(encoder: Encoder) -> None:
    task, source = get_task("sst"), generator(0, 7)

    def large(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=source)
        return drawn * (0.999 * _LARGEST / torch.linalg.vector_norm(drawn))

    sites = linear_layers(encoder)
    deltas = {site: Dense(large(size)) for site, size in sites.items()}
    rest = {name: one for name, one in encoder.model.named_parameters() if name.removesuffix(".weight") not in sites}
    head = {name: large(shape) for name, shape in head_shapes(encoder.config, task).items()}
    for shifts in ({}, {name: large(tuple(one.shape)) for name, one in rest.items()}):
        _check_sizes("here", deltas, {**shifts, **head})
        model = Merged(
            method="peft",
            weights={"sst": 1.0},
            base=Base.of(encoder),
            deltas=deltas,
            shifts=shifts,
            own={"sst": TaskSpecific(head, {}, {})},
            parts={"sst": {"task": task.to_json(), "max_length": encoder.max_length}},
        )
        assert np.isfinite(Predictor(model, encoder).outputs("sst", tiny_rows(task, 6))).all()
    with pytest.raises(ModelFileError, match="is changed by"):
        _check_sizes("here", {site: delta.scaled(1.01) for site, delta in deltas.items()}, {})
