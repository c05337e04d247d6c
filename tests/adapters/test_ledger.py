"""The basis ledger: rows are handed out once, for good, also to processes that ask at the same moment."""

import json
import multiprocessing
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.ledger import LEDGER, Ledger
from mergekit_bert.errors import BasisError, OutputError
from tests.adapters.helpers import quick


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
    with pytest.raises(BasisError, match=r"1 adapters hold 20 of 32 rows; expected 13 free rows.*--basis random"):
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
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a place that can be written"):
        Ledger(tmp_path / "file" / "adapters").take("base", "a", 4, 32)
