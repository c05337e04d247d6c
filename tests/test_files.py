"""Files: writes that are whole or absent, and fingerprints."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bert import files, tensorfile
from mergekit_bert.errors import OutputError
from tests.adapters.helpers import quick

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def parts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


@quick
@given(PLAIN)
def test_canonical_json_keeps_values_and_ignores_the_order_of_keys(value: object) -> None:
    text = files.canonical_json({"a": value, "b": 1})
    assert json.loads(text) == {"a": value, "b": 1}
    assert text == files.canonical_json({"b": 1, "a": value})
    assert files.fingerprint({"b": 1, "a": value}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_has_no_word_for(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json([value])


def test_a_folder_s_fingerprint_follows_every_weight_file(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    before = files.file_fingerprint(tmp_path)
    assert files.file_fingerprint(tmp_path / "a.safetensors") == hashlib.sha256(b"a.safetensors").hexdigest()
    (tmp_path / "b.safetensors").write_bytes(b"another")
    assert files.file_fingerprint(tmp_path) != before


def test_an_existing_path_is_refused_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.refuse_existing(path, force=False)
    path.write_bytes(b"")
    files.refuse_existing(path, force=True)
    with pytest.raises(OutputError, match=r"exists already.*`force`"):
        files.refuse_existing(path, force=False)


def test_a_dangling_link_exists(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        files.refuse_existing(tmp_path / "x", force=False)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_nothing_but_a_file_is_replaced_by_a_file(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "x", tmp_path / "target"
    if kind == "link":
        target.write_bytes(b"theirs")
    if "link" in kind:
        path.symlink_to("target")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    before = sorted((one.name, one.lstat().st_mode, one.lstat().st_ino) for one in tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"x: it is a .*; expected a place that can be written"):
        files.write_atomic(path, b"ours")
    assert sorted((one.name, one.lstat().st_mode, one.lstat().st_ino) for one in tmp_path.iterdir()) == before
    assert kind != "link" or target.read_bytes() == b"theirs"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_but_a_folder_is_replaced_by_a_folder(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "x", tmp_path / "target"
    target.mkdir()
    (target / "theirs").write_text("theirs")
    path.write_text("theirs") if kind == "file" else path.symlink_to("target")
    with pytest.raises(OutputError, match=r"x: it is a .*; expected a place"), files.atomic_folder(path):
        pass
    assert kind == "file" or os.readlink(path) == "target"
    assert (target / "theirs").read_text() == "theirs"
    assert parts(tmp_path) == []


def test_a_folder_that_cannot_be_moved_gives_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, really = tmp_path / "model", os.replace
    with files.atomic_folder(path) as part:
        (part / "old").write_text("old")

    def fail_second(source: Path, target: Path) -> None:
        if target == path and not (source / "old").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(source, target)

    monkeypatch.setattr(files.os, "replace", fail_second)
    with pytest.raises(OutputError, match="no space left"), files.atomic_folder(path) as part:
        (part / "new").write_text("new")
    assert (os.listdir(path), parts(tmp_path)) == (["old"], [])


def test_removing_a_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x").symlink_to("folder")
    files.remove(tmp_path / "x")
    assert os.listdir(tmp_path) == ["folder"]


def test_write_atomic_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "x.bin"
    for data in (b"first", b"second"):
        files.write_atomic(path, data)
        assert path.read_bytes() == data
    assert os.listdir(path.parent) == ["x.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


class _FullDisk:
    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "_FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.fdopen
    monkeypatch.setattr(files.os, "fdopen", lambda *args: _FullDisk(true(*args)))


def _failing(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda monkeypatch: monkeypatch.setattr(files.os, name, fail)


@pytest.mark.parametrize("fill", [_full_on_write, _failing("fsync"), _failing("replace")])
def test_a_full_disk_is_told_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    path = tmp_path / "x.safetensors"
    tensorfile.write_tensors(path, {"w": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(OutputError, match="no space left on device") as caught:
            tensorfile.write_tensors(path, {"w": torch.zeros(3)}, {"n": 2})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    files.write_atomic(path, b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert parts(tmp_path) == []


@pytest.mark.parametrize("name", ["file/below", "folder"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="a place that can be written"):
        files.write_atomic(tmp_path / name, b"data")
    assert parts(tmp_path) == []


_WRITER = """
import sys
from pathlib import Path
from mergekit_bert.files import write_atomic
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        write_atomic(Path(sys.argv[1]), letter * 2_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    path, chance = tmp_path / "x.bin", random.Random(0)
    whole = {hashlib.sha256(letter * 2_000_000).hexdigest() for letter in (b"a", b"b")}
    broken_off = 0
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        assert not path.exists() or files.file_fingerprint(path) in whole
        broken_off += len(parts(tmp_path))
        files.sweep_parts(path)
        assert set(os.listdir(tmp_path)) <= {path.name}
    assert broken_off > 0, "no writer was killed in the middle"


def test_sweeping_leaves_the_parts_of_other_files(tmp_path: Path) -> None:
    others = [tmp_path / ".x.mine.part", tmp_path / ".x.v2.mbert-abc.part", tmp_path / ".y.mbert-abc.part"]
    for other in others:
        other.write_bytes(b"")
    (tmp_path / ".x.mbert-abc.part").mkdir()
    files.sweep_parts(tmp_path / "x")
    assert sorted(parts(tmp_path)) == others


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"b": 1, "ä": [2]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "ä": [\n    2\n  ]\n}\n'


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("first", "second"):
        with files.atomic_folder(path) as part:
            (part / name).write_text(name)
            assert not (path / name).exists()
        assert os.listdir(path) == [name]
    assert os.listdir(tmp_path) == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("raised", "told"), [(OSError(errno.ENOSPC, "No space"), OutputError), (KeyError(), KeyError)])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, raised: Exception, told: type[Exception]) -> None:
    path = tmp_path / "model"
    with files.atomic_folder(path) as part:
        (part / "old").write_text("old")

    def fail() -> None:
        with files.atomic_folder(path) as part:
            (part / "new").write_text("new")
            raise raised

    with pytest.raises(told):
        fail()
    assert os.listdir(path) == ["old"]
    assert parts(tmp_path) == []
