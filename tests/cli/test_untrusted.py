"""Files that name a base of their author's choice: one line, exit code 1, and nothing of theirs has run."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.formats.file import write_model
from mergekit_bert.formats.peft_format import write_peft
from tests.adapters.helpers import random_adapter
from tests.cli.command import Done, mbert
from tests.encoder.evil import MARK, Spoil, code, pickled, says
from tests.formats.test_checkpoint import fine_tuned

EVIL: dict[str, tuple[Spoil, str]] = {
    "code": (code(model_type="evil"), "asks for code of its own"),
    "code for a known kind": (code(), "asks for code of its own"),
    "a pickle": (pickled, "no model.safetensors, but pytorch_model.bin, a pickle, which can run code"),
    "layers": (says(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a vocabulary": (says(vocab_size=2**40), "vocab_size is 1099511627776"),
    "a kernel": (says(attn_implementation="evil/kernel"), "asks for a kernel"),
    "another base": (says("adapter_config.json", base_model_name_or_path="evil/base"), "it is a PEFT adapter"),
}


@pytest.fixture
def here(tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, which holds a copy of the tiny BERT as ``base``."""
    monkeypatch.delenv("MBERT_ALLOWED_BASES", raising=False)
    shutil.copytree(tiny_folders["bert"], tmp_path / "base")
    return tmp_path


def naming(encoder: mb.Encoder, name: str, task: str = "sst") -> Adapter:
    """An adapter that says its base is called ``name``."""
    one = random_adapter(encoder, task)
    return dataclasses.replace(one, base=dataclasses.replace(one.base, name=name))


def refused(done: Done, here: Path, message: str) -> None:
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done.err
    assert message in done.err
    assert done.err.startswith("error: ")
    assert not (here / MARK).exists()


@pytest.mark.parametrize("name", EVIL)
def test_a_file_that_names_an_evil_folder(here: Path, bert: mb.Encoder, name: str) -> None:
    spoil, message = EVIL[name]
    write_adapter(here / "evil.safetensors", naming(bert, "base"))
    assert mbert("predict", "evil.safetensors", "good", here=here).code == 0  # the folder is the adapter's own
    spoil(here / "base")
    refused(mbert("predict", "evil.safetensors", "hello", stdin=b"y\n", here=here), here, message)
    refused(mbert("predict", "evil.safetensors", "hello", "--base", "base", stdin=b"y\n", here=here), here, message)


def _files(here: Path, bert: mb.Encoder, name: str) -> Iterator[tuple[str, ...]]:
    """Commands on files and folders of every kind that say their base is called ``name``."""
    one, two = (naming(bert, name, task) for task in ("sst", "sts"))
    write_adapter(here / "one.safetensors", one)
    write_adapter(here / "two.safetensors", two)
    yield "predict", "one.safetensors", "hello"
    yield "eval", "one.safetensors", "--data", "sample"
    yield "convert", "one.safetensors", "--to", "peft", "--out", "out"
    yield "convert", "one.safetensors", "--to", "hf", "--out", "out"
    for method in ("fedavg", "ensemble"):
        write_model(here / f"{method}.safetensors", mb.merge([one, two], method))
        yield "predict", f"{method}.safetensors", "hello", "--task", "sst"
        yield "merge", "one.safetensors", "two.safetensors", "--method", method, "--dense", "out"
    yield "merge", "one.safetensors", "two.safetensors", "--method", "regmean", "--data", "sample"
    yield "compare", "one.safetensors", "two.safetensors", "--methods", "fedavg", "--data", "sample", "--out", "out"
    yield "doctor", "one.safetensors", "two.safetensors", "--methods", "fedavg", "--data", "sample"
    write_peft(here / "sst", random_adapter(bert, "sst"), bert)
    record = json.loads((here / "sst/mbert.json").read_text())
    record["base"]["name"] = name
    (here / "sst/mbert.json").write_text(json.dumps(record))
    yield "merge", "sst", "--method", "fedavg"
    yield "convert", "sst", "--to", "mbert", "--out", "out.safetensors"
    (here / "sst/mbert.json").unlink()
    says("adapter_config.json", base_model_name_or_path=name)(here / "sst")
    yield "convert", "sst", "--to", "mbert", "--out", "out.safetensors"
    fine_tuned(bert, "sts", here / "sts")
    record = json.loads((here / "sts/mbert.json").read_text())
    record["base"]["name"] = name
    (here / "sts/mbert.json").write_text(json.dumps(record))
    yield "merge", "sts", "--method", "fedavg", "--dense", "out"


@pytest.mark.parametrize("name", ["evil/base", "/dev/zero"])
def test_no_file_chooses_a_base(here: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("mergekit_bert.encoder.places._snapshot", lambda name: pytest.fail("looked for"))
    for words in _files(here, bert, name):
        done = mbert(*words, stdin=b"y\n", here=here)
        refused(done, here, f"it names the base '{name}', which a file may not choose")
        assert "name it with --base" in done.err


@pytest.mark.parametrize("name", ["pipe", "http://evil/base", "/dev/stdin", "a\0b", "\n\x1b[31mevil", "x" * 10**5])
def test_nothing_odd_is_opened(here: Path, bert: mb.Encoder, name: str) -> None:
    plain = name.isprintable() and len(name) < 100
    told = "which a file may not choose" if plain else "broken metadata (base.name: "
    os.mkfifo(here / "pipe")
    write_adapter(here / "evil.safetensors", naming(bert, name))
    refused(mbert("predict", "evil.safetensors", "hello", stdin=b"y\n", here=here), here, told)


def test_the_user_s_word_counts(here: Path, bert: mb.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(here / "one.safetensors", naming(bert, "someone/base"))
    words = ("predict", "one.safetensors", "good")
    assert mbert(*words, "--base", "base", here=here).code == 0
    monkeypatch.setattr("mergekit_bert.encoder.places._snapshot", lambda name: here / "base")
    assert mbert(*words, here=here).code == 1
    monkeypatch.setenv("MBERT_ALLOWED_BASES", "someone/base")
    assert mbert(*words, here=here).code == 0


def test_a_base_that_is_another_one_is_told_before_anything_else(here: Path, bert: mb.Encoder) -> None:
    base = dataclasses.replace(bert, fingerprint="0" * 64, name="base")
    write_adapter(here / "one.safetensors", random_adapter(base))
    refused(mbert("predict", "one.safetensors", "good", here=here), here, "made for base 'base' (weights 000000000000)")


def test_help_says_which_names_are_followed() -> None:
    told = mbert("predict", "--help").out
    assert "MBERT_ALLOWED_BASES" in told
