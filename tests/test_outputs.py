"""Outputs: one run at a time, made beside their place, and moved there only where nothing foreign lies."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bert import files
from mergekit_bert.errors import ModelFileError, OutputError
from mergekit_bert.outputs import Output, claimed, held, written
from mergekit_bert.tensorfile import write_tensors

BUSY = "another mbert run is writing it"
INSIDE = ("mbert.json", "model.safetensors", "*.txt")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def in_a_thread(work: Callable[[], None]) -> BaseException | None:
    """What ``work`` raises in a thread of its own."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0] if found else None


def hold(path: Path) -> None:
    with held(path):
        pass


def test_one_thread_holds_an_output_and_may_hold_it_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with held(path):
        hold(path)
        error = in_a_thread(lambda: hold(path))
        assert isinstance(error, OutputError)
        assert BUSY in str(error)
        assert "\n" not in str(error)
        assert in_a_thread(lambda: hold(tmp_path / "b.safetensors")) is None
    assert in_a_thread(lambda: hold(path)) is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("other", ["real/a", "link/a.safetensors", "link/../real/a.safetensors"])
def test_an_output_is_known_under_all_its_names(tmp_path: Path, other: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with held(tmp_path / "real/a.safetensors"):  # x and x.safetensors share x.run
        assert BUSY in str(in_a_thread(lambda: hold(tmp_path / other)))
        hold(tmp_path / other)


def test_one_who_waits_gets_it_afterwards(tmp_path: Path) -> None:
    order = []

    def wait() -> None:
        with held(tmp_path / "a", wait=True):
            order.append("second")

    with held(tmp_path / "a"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert names(tmp_path) == []


_HOLDER = """
import sys
from pathlib import Path
from mergekit_bert.outputs import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "adapters/a.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=BUSY):
            hold(path)
        holder.send_signal(signal.SIGKILL)
    assert list(path.parent.glob("*.safetensors")) == []
    hold(path)
    assert names(path.parent) == []


def test_folders_made_for_nothing_go_again(tmp_path: Path) -> None:
    def fail() -> None:
        with held(tmp_path / "new/deep/a"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []
    with held(tmp_path / "new/deep/a"):
        (tmp_path / "new/kept").write_text("")
    assert names(tmp_path / "new") == ["kept"]


def test_no_output_is_asked_for_twice(tmp_path: Path) -> None:
    one, two = Output(tmp_path / "a"), Output(tmp_path / "sub" / ".." / "a")
    with pytest.raises(OutputError, match="asked for twice"), claimed(one, one):
        pass
    with claimed(one, Output(tmp_path / "b")):
        assert names(tmp_path) == [".a.lock", ".b.lock"]
    assert two.path != one.path


def test_what_is_finished_appears_whole_and_alone(tmp_path: Path) -> None:
    file, folder = Output(tmp_path / "new/x.json"), Output(tmp_path / "new/model", inside=INSIDE)
    with written(file, folder) as (one, two):
        assert (one.name, two.name) == ("x.json", "model")
        files.write_atomic(one, b"data")
        with files.atomic_folder(two) as part:
            (part / "mbert.json").write_text("{}")
        assert not file.path.exists()
        assert not folder.path.exists()
    assert names(tmp_path / "new") == ["model", "x.json"]
    assert file.path.read_bytes() == b"data"
    assert file.path.stat().st_mode & 0o777 == 0o644
    assert file.path.stat().st_nlink == 1
    assert names(folder.path) == ["mbert.json"]


def test_what_fails_on_the_way_leaves_nothing_and_names_the_output(tmp_path: Path) -> None:
    def fail() -> None:
        with written(Output(tmp_path / "x")) as (part,):
            part.write_bytes(b"half")
            raise ModelFileError(str(part), f"{part} differs", "no difference", "write it again")

    with pytest.raises(ModelFileError) as caught:
        fail()
    path = str(tmp_path / "x")
    assert str(caught.value) == f"{path}: {path} differs; expected no difference; write it again"
    assert names(tmp_path) == []


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "link", refuse)


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with and without hard links."""
    if not request.param:
        no_links(monkeypatch)


def make_file(path: Path) -> None:
    path.write_text("theirs")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "theirs").write_text("theirs")


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


APPEARING = {"file": make_file, "folder": make_folder, "dangling link": make_dangling}


def snapshot(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    return {one.name: one.read_text() for one in path.iterdir()} if path.is_dir() else path.read_text()


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("appearing", APPEARING)
@pytest.mark.parametrize("unseen", [False, True], ids=["found", "found only by the move itself"])
def test_what_appeared_in_the_meantime_stays_and_the_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, appearing: str, unseen: bool
) -> None:
    path = tmp_path / "x.safetensors"
    make_file(path.with_name(f"{path.name}.kept1"))  # from another time

    def run() -> None:
        with written(Output(path, inside=INSIDE if kind == "folder" else ())) as (part,):
            if kind == "folder":
                part.mkdir()
            (part / "mbert.json" if kind == "folder" else part).write_text("ours")
            APPEARING[appearing](path)
            if unseen:
                monkeypatch.setattr(Output, "refuse", lambda output: None)

    with pytest.raises(OutputError, match=r"x.safetensors: something else was written there.*kept2: move one") as told:
        run()
    assert "\n" not in str(told.value)
    theirs = tmp_path / "theirs"
    APPEARING[appearing](theirs)
    assert snapshot(path) == snapshot(theirs)
    assert snapshot(tmp_path / "x.safetensors.kept2") == ({"mbert.json": "ours"} if kind == "folder" else "ours")
    assert snapshot(tmp_path / "x.safetensors.kept1") == "theirs"
    assert names(tmp_path) == ["theirs", "x.safetensors", "x.safetensors.kept1", "x.safetensors.kept2"]


@pytest.mark.usefixtures("links")
def test_nothing_in_the_way_is_no_matter(tmp_path: Path) -> None:
    with written(Output(tmp_path / "x")) as (part,):
        part.write_text("ours")
    assert (tmp_path / "x").read_text() == "ours"
    assert names(tmp_path) == ["x"]


def test_a_move_that_fails_without_hard_links_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    no_links(monkeypatch)
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match="no space left"), written(Output(tmp_path / "x")) as (part,):
        part.write_text("ours")
    assert names(tmp_path) == []


def test_one_that_may_not_be_moved_does_not_hold_up_the_others(tmp_path: Path) -> None:
    def run() -> None:
        with written(*(Output(tmp_path / name) for name in "abc")) as parts:
            for part in parts:
                part.write_text("ours")
            make_file(tmp_path / "b")

    with pytest.raises(OutputError, match=r"/b: .*b.kept1"):
        run()
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a": "ours",
        "b": "theirs",
        "b.kept1": "ours",
        "c": "ours",
    }


def test_what_a_claim_has_not_seen_does_not_cost_the_work(tmp_path: Path) -> None:
    output = Output(tmp_path / "x")

    def run() -> None:
        with claimed(output):
            make_file(output.path)
            with written(output) as (part,):
                part.write_text("ours")

    with pytest.raises(OutputError, match=r"x.kept1"):
        run()
    assert (tmp_path / "x").read_text() == "theirs"
    assert (tmp_path / "x.kept1").read_text() == "ours"


def test_a_run_that_can_be_repeated_keeps_nothing_but_says_how(tmp_path: Path) -> None:
    def run() -> None:
        with written(Output(tmp_path / "x"), remedy="give `resume`") as (part,):
            part.write_text("ours")
            make_file(tmp_path / "x")

    with pytest.raises(OutputError, match="give `resume`"):
        run()
    assert names(tmp_path) == ["x"]


def mbert_file(path: Path) -> None:
    write_tensors(path, {"w": torch.ones(2)}, {"n": 1})


def foreign_weights(path: Path) -> None:
    save_file({"w": torch.ones(2)}, path, {"format": "pt"})


def mbert_folder(path: Path) -> None:
    path.mkdir()
    for name in ("mbert.json", "model.safetensors", "vocab.txt"):
        (path / name).write_text(name)


def with_a_note(path: Path) -> None:
    mbert_folder(path)
    (path / "notes.md").write_text("mine")


def with_a_folder(path: Path) -> None:
    mbert_folder(path)
    (path / "mine.txt").mkdir()


def with_a_link(path: Path) -> None:
    mbert_folder(path)
    (path / "mine.txt").symlink_to("/etc/hostname")


def without_a_record(path: Path) -> None:
    mbert_folder(path)
    (path / "mbert.json").unlink()


def link_to(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        make(path.with_name("target"))
        path.symlink_to("target")

    return build


STAYS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...], str]] = {
    "dangling link": (make_dangling, "x.json", (), "as a symbolic link"),
    "link to a file": (link_to(make_file), "x.json", (), "as a symbolic link"),
    "link to a model": (link_to(mbert_file), "x.safetensors", (), "as a symbolic link"),
    "link to a folder": (link_to(mbert_folder), "x", INSIDE, "as a symbolic link"),
    "pipe": (lambda path: os.mkfifo(path), "x.json", (), "as a device or pipe"),
    "folder for a file": (mbert_folder, "x.json", (), "as a folder"),
    "empty folder for a file": (lambda path: path.mkdir(), "x.json", (), "as a folder"),
    "file for a folder": (make_file, "x", INSIDE, "as a file"),
    "another program's weights": (foreign_weights, "x.safetensors", (), "with weights that another program wrote"),
    "a note in a folder": (with_a_note, "x", INSIDE, r"and holds notes.md, which mbert does not write there"),
    "a folder in a folder": (with_a_folder, "x", INSIDE, r"and holds mine.txt"),
    "a link in a folder": (with_a_link, "x", INSIDE, r"and holds mine.txt"),
    "another program's folder": (without_a_record, "x", INSIDE, r"without the mbert.json"),
}


def everything(folder: Path) -> dict[str, object]:
    """Every file, link and other thing below ``folder``."""
    return {
        str(one.relative_to(folder)): one.read_bytes() if one.is_file() else one.lstat().st_mode
        for one in folder.rglob("*")
    }


def make_new(part: Path, inside: tuple[str, ...]) -> None:
    """What a run has made."""
    if inside:
        part.mkdir()
    (part / "mbert.json" if inside else part).write_text("new")


@pytest.mark.parametrize("case", STAYS)
def test_force_does_not_replace_what_mbert_did_not_write(tmp_path: Path, case: str) -> None:
    make, name, inside, reason = STAYS[case]
    make(tmp_path / name)
    before = everything(tmp_path)
    with (
        pytest.raises(OutputError, match=f"{name}: it exists already {reason}") as caught,
        written(Output(tmp_path / name, True, inside)),
    ):
        pytest.fail("it is refused before any work")
    assert "\n" not in str(caught.value)
    assert "`force`" not in caught.value.remedy
    assert everything(tmp_path) == before


@pytest.mark.parametrize("case", STAYS)
def test_nor_what_appeared_in_the_meantime(tmp_path: Path, case: str) -> None:
    make, name, inside, _ = STAYS[case]
    before: dict[str, object] = {}

    def run() -> None:
        with written(Output(tmp_path / name, True, inside)) as (part,):
            make_new(part, inside)
            make(tmp_path / name)
            before.update({key: value for key, value in everything(tmp_path).items() if not key.startswith(".")})

    with pytest.raises(OutputError, match=rf"{name}: something else was written there .*/{name}.kept1"):
        run()
    assert snapshot(tmp_path / f"{name}.kept1") == ({"mbert.json": "new"} if inside else "new")
    assert {key: value for key, value in everything(tmp_path).items() if ".kept1" not in key} == before


GOES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "a file": (make_file, "x.json", ()),
    "a model": (mbert_file, "x.safetensors", ()),
    "a broken model": (make_file, "x.safetensors", ()),
    "an empty model": (lambda path: path.touch(), "x.safetensors", ()),
    "a folder": (mbert_folder, "x", INSIDE),
    "an empty folder": (lambda path: path.mkdir(), "x", INSIDE),
    "nothing": (lambda path: None, "x.safetensors", ()),
}


@pytest.mark.parametrize("case", GOES)
def test_force_replaces_what_mbert_wrote(tmp_path: Path, case: str) -> None:
    make, name, inside = GOES[case]
    make(tmp_path / name)
    with written(Output(tmp_path / name, True, inside)) as (part,):
        make_new(part, inside)
    assert names(tmp_path) == [name]
    assert snapshot(tmp_path / name) == ({"mbert.json": "new"} if inside else "new")


def test_without_force_anything_stays(tmp_path: Path) -> None:
    for make in (make_file, make_dangling, mbert_folder):
        path = tmp_path / make.__name__
        make(path)
        with pytest.raises(OutputError, match=r"it exists already; .*`force`"):
            Output(path, inside=INSIDE).refuse()
    (tmp_path / "linked").symlink_to(tmp_path / "mbert_folder")
    Output(tmp_path / "linked" / "x").refuse()  # a parent may be a link
