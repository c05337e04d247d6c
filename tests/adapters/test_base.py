"""Which encoder a file gets, and which names in a file are followed."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.base import encoder_of
from mergekit_bert.encoder.load import Base
from mergekit_bert.errors import ModelFileError
from mergekit_bert.schema import SchemaError, validate
from tests.tiny import write_tiny


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, bert: mb.Encoder) -> list[str]:
    """What :func:`load` was asked for."""
    monkeypatch.delenv("MBERT_ALLOWED_BASES", raising=False)
    return []


def find(base: Base | str, loaded: list[str], bert: mb.Encoder, given: Any = None) -> mb.Encoder:
    def load(name: str) -> mb.Encoder:
        loaded.append(name)
        return bert

    return encoder_of("x.safetensors", base, given, load)


def named(bert: mb.Encoder, name: str) -> Base:
    return dataclasses.replace(Base.of(bert), name=name)


def test_the_user_s_own_name_is_always_followed(bert: mb.Encoder, loaded: list[str]) -> None:
    for given in ("someone/base", "/no/such/folder", Path("there")):
        assert find(named(bert, "evil/base"), loaded, bert, given) is bert
        assert find("evil/base", loaded, bert, given) is bert
        assert loaded == [str(given)] * 2
        loaded.clear()
    assert find(named(bert, "evil/base"), loaded, bert, bert) is bert
    assert loaded == []


def test_a_file_may_name_minilm_and_a_folder_whose_fingerprint_it_has(
    bert: mb.Encoder, loaded: list[str], tmp_path: Path
) -> None:
    for name in ("minilm", str(tmp_path)):
        assert find(named(bert, name), loaded, bert) is bert
    assert find("minilm", loaded, bert) is bert
    assert loaded == ["minilm", str(tmp_path), "minilm"]


@pytest.mark.parametrize(
    "name",
    [
        *("evil/base", "bert-base-uncased", "/no/such/folder", "../x", "", ".", "http://evil/base", "\\\\evil\\share"),
        *("/dev/zero", "/dev/stdin", "PIPE", "FILE", "a\0b", "x" * 10**5, "\n\x1b[31mx", "minilm\n", " minilm"),
    ],
)
def test_a_file_may_name_nothing_else(
    bert: mb.Encoder, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    Path("FILE").write_text("")
    for base in (named(bert, name), name) if name != "." else (name,):  # the folder "." is there
        with pytest.raises(
            ModelFileError, match=r"^x.safetensors: it names the base .*; name it with `base`$"
        ) as caught:
            find(base, loaded, bert)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
    assert loaded == []


def test_a_folder_without_a_fingerprint_is_not_followed(bert: mb.Encoder, loaded: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="which a file may not choose"):
        find(str(tmp_path), loaded, bert)


def test_the_user_may_allow_names(bert: mb.Encoder, loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBERT_ALLOWED_BASES", " someone/base ,, /a/folder")
    for name in ("someone/base", "/a/folder"):
        assert find(named(bert, name), loaded, bert) is bert
        assert find(name, loaded, bert) is bert
    for name in ("someone", "base", "", ",", "someone/base ,", "Someone/Base"):
        with pytest.raises(ModelFileError, match="MBERT_ALLOWED_BASES"):
            find(named(bert, name), loaded, bert)


@pytest.mark.parametrize("key", ["fingerprint", "tokenizer_fingerprint"])
def test_the_fingerprints_must_be_the_file_s(bert: mb.Encoder, loaded: list[str], tmp_path: Path, key: str) -> None:
    base = dataclasses.replace(named(bert, str(tmp_path)), **{key: "0" * 64})
    for given in (None, "someone/base", bert):
        with pytest.raises(ModelFileError, match=r"made (for base|with another tokenizer)"):
            find(base, loaded, bert, given)


def test_a_folder_that_was_changed_since_is_refused(tmp_path: Path, bert: mb.Encoder) -> None:
    other = write_tiny(tmp_path / "other", "bert", seed=3)
    with pytest.raises(ModelFileError, match=r"made for base .*other"):
        encoder_of("x", named(bert, str(other)))


@pytest.mark.parametrize(
    "wrong",
    [{"fingerprint": 7}, {"fingerprint": "0" * 63}, {"tokenizer_fingerprint": "0" * 63 + "\n"}, {"name": ["minilm"]}],
)
def test_a_base_is_a_name_and_two_digests(bert: mb.Encoder, wrong: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=next(iter(wrong))):
        validate(Base, dataclasses.asdict(Base.of(bert)) | wrong)
