"""The basis ledger: rows are handed out once, for good, also to processes that ask at the same moment."""

import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bert import tensorfile
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.adapters.ledger import LEDGER, Ledger
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import BasisError, OutputError
from mergekit_bert.tensorfile import write_plain_tensors, write_tensors
from tests.adapters.helpers import quick, random_adapter


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "adapters")


def test_rows_are_handed_out_from_the_first_on(ledger: Ledger) -> None:
    assert ledger.take("base", "a", 4, 32) == BasisRows(0, 0, 4)
    assert ledger.take("base", "b", 8, 32) == BasisRows(0, 4, 8)
    assert ledger.take("base", "c", 1, 32) == BasisRows(0, 12, 1)
    stored = json.loads(ledger.path.read_text())
    assert ledger.path.name == LEDGER == "basis.json"
    assert stored["bases"]["base"]["b"] == {"start": 4, "count": 8}


def test_a_holder_keeps_its_rows(ledger: Ledger) -> None:
    for name in ("a", "b"):
        ledger.take("base", name, 4, 32)
    again = Ledger(ledger.path.parent)
    assert again.take("base", "a", 4, 32) == BasisRows(0, 0, 4)
    assert again.take("base", "b", 4, 32) == BasisRows(0, 4, 4)
    assert again.capacity_left("base", 4, 32) == 6


def test_another_rank_gives_up_the_old_rows_and_gaps_are_used_again(ledger: Ledger) -> None:
    for name in ("a", "b"):
        ledger.take("base", name, 4, 32)
    assert ledger.take("base", "a", 6, 32) == BasisRows(0, 8, 6)
    assert ledger.take("base", "c", 3, 32) == BasisRows(0, 0, 3)
    assert ledger.take("base", "d", 2, 32) == BasisRows(0, 14, 2)
    assert ledger.take("base", "e", 1, 32) == BasisRows(0, 3, 1)


def test_a_holder_whose_rows_are_too_wide_for_its_new_sites_gets_others(ledger: Ledger) -> None:
    for name in ("a", "b"):
        ledger.take("base", name, 4, 32)
    assert ledger.take("base", "a", 2, 16) == BasisRows(0, 0, 2)
    assert ledger.take("base", "b", 4, 7) == BasisRows(0, 2, 4)


def test_bases_are_counted_apart(ledger: Ledger) -> None:
    ledger.take("one", "a", 8, 16)
    ledger.take("one", "b", 8, 16)
    assert ledger.capacity_left("one", 8, 16) == 0
    assert ledger.take("two", "a", 8, 16) == BasisRows(0, 0, 8)


def test_capacity_is_the_number_of_adapters_that_still_fit(ledger: Ledger) -> None:
    assert ledger.capacity_left("base", 8, 384) == 48
    assert ledger.capacity_left("base", 5, 32) == 6
    for left, name in enumerate("abcdef"):
        assert ledger.capacity_left("base", 5, 32) == 6 - left
        ledger.take("base", name, 5, 32)
    assert ledger.capacity_left("base", 2, 32) == 1


def test_a_full_basis_is_refused_and_nothing_is_written(ledger: Ledger) -> None:
    ledger.take("base", "a", 20, 32)
    before = ledger.path.read_bytes()
    with pytest.raises(BasisError, match=r"1 adapters hold 20 of 32 rows; expected 13 free rows.*`basis=random`"):
        ledger.take("base", "b", 13, 32)
    assert ledger.path.read_bytes() == before


def test_an_existing_ledger_keeps_its_seed(tmp_path: Path) -> None:
    assert Ledger(tmp_path, seed=5).take("base", "a", 2, 8) == BasisRows(5, 0, 2)
    assert Ledger(tmp_path, seed=6).take("base", "b", 2, 8) == BasisRows(5, 2, 2)


@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=12))
def test_no_two_holders_ever_share_a_row(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int]]
) -> None:
    ledger, held = Ledger(tmp_path_factory.mktemp("ledger")), {}
    for holder, count in asked:
        fits = ledger.capacity_left("base", count, 24) > 0
        try:
            held[holder] = ledger.take("base", str(holder), count, 24)
            assert held[holder].count == count
            assert held[holder].start + count <= 24
        except BasisError:
            assert not fits
        assert not any(one.overlaps(two) for one, two in combinations(held.values(), 2))


def _take(folder: Path, name: str, start: Any) -> None:
    start.wait()
    for part in range(4):
        Ledger(folder).take("base", f"{name}{part}", 3, 96)


def test_processes_that_ask_at_once_get_disjoint_rows(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(6)
    workers = [context.Process(target=_take, args=(tmp_path, name, start)) for name in "abcdef"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    rows = json.loads((tmp_path / LEDGER).read_text())["bases"]["base"]
    assert sorted(one["start"] for one in rows.values()) == list(range(0, 72, 3))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"text"',
        "{}",
        '{"version": 2, "seed": 0, "bases": {}}',
        '{"version": 1, "seed": "0", "bases": {}}',
        '{"version": 1, "seed": 0, "bases": []}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": 0}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": "x", "count": 1}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": "0", "count": 1}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": -4, "count": 4}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": 0, "count": 0}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": Infinity, "count": 4}}}}',
        '{"version": 1, "seed": 0, "seed": 1, "bases": {}}',
        '{"version": 1, "seed": 0, "bases": {}, "more": 1}',
        '{"version": true, "seed": 0, "bases": {}}',
        '{"version": 1, "seed": 1e999, "bases": {}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": 0, "count": 1e400}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"\\u001b[2J": {"start": 0, "count": 4}}}}',
        '{"version": 1, "seed": 0, "bases": {"base": {"a": {"start": 0, "count": 4}, "b": {"start": 3, "count": 4}}}}',
        f'{{"version": 1, "seed": {"9" * 4300}, "bases": {{}}}}',
        f'{{"version": 1, "seed": 0, "bases": {"[" * 100_000}',
        b"\xff\xfe",
    ],
)
def test_a_broken_ledger_is_told_and_kept(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / LEDGER
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    for ask in (Ledger(tmp_path).take, lambda *_: Ledger(tmp_path).capacity_left("base", 4, 32)):
        with pytest.raises(BasisError, match=r"not readable as a ledger.*without it rows could collide") as caught:
            ask("base", "a", 4, 32)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_ledger_that_is_no_file_is_told(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / LEDGER)
    with pytest.raises(BasisError, match=r"not readable as a ledger \((a folder|no regular file)\)"):
        Ledger(tmp_path).take("base", "a", 4, 32)


def test_a_name_that_nobody_could_read_again_is_not_written(ledger: Ledger) -> None:
    ledger.take("base", "a", 4, 32)
    before = ledger.path.read_bytes()
    with pytest.raises(BasisError, match=r"the name 'b\\x1b'; expected a plain file name"):
        ledger.take("base", "b\x1b", 4, 32)
    assert ledger.path.read_bytes() == before


def rows_of(base: str, **holders: int) -> str:
    """A ledger in which everyone holds three rows from a start on."""
    held = {name: {"start": start, "count": 3} for name, start in holders.items()}
    return json.dumps({"version": 1, "seed": 0, "bases": {base: held}})


@pytest.fixture
def folder(bert: Encoder, tmp_path: Path) -> Path:
    """A folder with two adapters, sst of the rows 0 to 2 and sts of 3 to 5, and their ledger."""
    for place, task in enumerate(("sst", "sts")):
        write_adapter(tmp_path / f"{task}.safetensors", random_adapter(bert, task, start=3 * place))
    (tmp_path / LEDGER).write_text(rows_of(bert.fingerprint, sst=0, sts=3))
    return tmp_path


def test_files_that_are_as_the_ledger_says_are_no_hindrance(bert: Encoder, folder: Path) -> None:
    ledger = Ledger(folder)
    assert ledger.take(bert.fingerprint, "para", 3, 24) == BasisRows(0, 6, 3)
    assert ledger.take(bert.fingerprint, "sst", 3, 24) == BasisRows(0, 0, 3)
    assert ledger.take(bert.fingerprint, "sst", 4, 24) == BasisRows(0, 9, 4)


def test_a_file_that_the_ledger_does_not_know_is_told_with_the_way_out(bert: Encoder, folder: Path) -> None:
    (folder / LEDGER).write_text(rows_of(bert.fingerprint, sst=0))
    before = (folder / LEDGER).read_bytes()
    message = (
        r"sts.safetensors: it holds basis rows 3 to 5, of which basis.json does not know; expected .*; restore "
        r'basis.json, move the file to another folder, or add ("sts": (\{.*\})) to \'(.*)\' there$'
    )
    with pytest.raises(BasisError, match=message) as caught:
        Ledger(folder).take(bert.fingerprint, "para", 3, 24)
    assert (folder / LEDGER).read_bytes() == before
    found = re.search(message, str(caught.value))
    assert found is not None
    ledger = json.loads(before)
    ledger["bases"][found[3]]["sts"] = json.loads(found[2])
    (folder / LEDGER).write_text(json.dumps(ledger))
    assert Ledger(folder).take(bert.fingerprint, "para", 3, 24) == BasisRows(0, 6, 3), "as the message says"


def test_a_lost_ledger_is_told_before_rows_collide(bert: Encoder, folder: Path) -> None:
    (folder / LEDGER).unlink()
    with pytest.raises(BasisError, match=r"sst.safetensors: it holds basis rows 0 to 2, of which basis.json does not"):
        Ledger(folder).take(bert.fingerprint, "para", 3, 24)
    assert not (folder / LEDGER).exists()


@pytest.mark.parametrize("asked", ["para", "sts"])
def test_a_file_with_rows_that_another_holds_is_told(bert: Encoder, folder: Path, asked: str) -> None:
    write_adapter(folder / "sst.safetensors", random_adapter(bert, "sst", start=4))
    message = r"sst.safetensors: it holds basis rows 4 to 6, which basis.json gives to sts; expected .*; move it to"
    with pytest.raises(BasisError, match=message):
        Ledger(folder).take(bert.fingerprint, asked, 3, 24)
    assert Ledger(folder).take(bert.fingerprint, "sst", 3, 24) == BasisRows(0, 0, 3), "its own file goes"


def test_a_file_that_is_about_to_be_overwritten_keeps_its_old_rows_until_then(bert: Encoder, folder: Path) -> None:
    ledger = Ledger(folder)
    assert ledger.take(bert.fingerprint, "sst", 5, 24) == BasisRows(0, 6, 5)
    assert ledger.take(bert.fingerprint, "para", 3, 24) == BasisRows(0, 11, 3), "sst's file may stay, should that fail"
    write_adapter(folder / "sst.safetensors", random_adapter(bert, "sst", rank=5, start=6))
    assert ledger.take(bert.fingerprint, "more", 3, 24) == BasisRows(0, 0, 3)


def test_files_of_other_bases_and_kinds_are_passed_over(
    bert: Encoder, encoders: dict[str, Encoder], folder: Path
) -> None:
    write_adapter(folder / "base.safetensors", random_adapter(encoders["electra"], "sst", start=0))
    other = dataclasses.replace(random_adapter(bert, "sst"), basis=BasisRows(7, 0, 3))
    write_adapter(folder / "seed.safetensors", other)
    write_adapter(folder / "loose.safetensors", random_adapter(bert, "sst", basis="random"))
    write_adapter(folder / "probe.safetensors", random_adapter(bert, "sst", kind="probe"))
    write_plain_tensors(folder / "plain.safetensors", {"a": torch.zeros(2)})
    for name, metadata in (("odd", {"adapter": 7}), ("older", {"adapter": {"basis": [1], "base": 1}}), ("list", {})):
        write_tensors(folder / f"{name}.safetensors", {"a": torch.zeros(2)}, metadata)
    (folder / "broken.safetensors").write_bytes(b"\xff" * 99)
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    assert Ledger(folder).take(bert.fingerprint, "para", 3, 24) == BasisRows(0, 6, 3)


def test_only_the_headers_of_files_are_read(bert: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "_values", lambda path: pytest.fail("the tensors are read"))
    assert Ledger(folder).take(bert.fingerprint, "para", 3, 24) == BasisRows(0, 6, 3)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a place that can be written"):
        Ledger(tmp_path / "file" / "adapters").take("base", "a", 4, 32)
