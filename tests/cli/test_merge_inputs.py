"""Merged files beside adapters of their tasks: what is refused, and that the ways out that it tells lead out."""

from pathlib import Path

import pytest

import mergekit_bert as mb
from mergekit_bert.models.composition import Merged
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert, unchanged

CHANGE = "or `mbert merge pair.safetensors --remove sst --out FILE` first"


@pytest.fixture
def home(bert: mb.Encoder, tmp_path: Path) -> Path:
    """Adapters, one of them a second one of sst, and merges of two tasks: ``pair`` has kept its adapters."""
    for place, (name, task) in enumerate((("sst", "sst"), ("sts", "sts"), ("para", "para"), ("other", "sst"))):
        mb.save(random_adapter(bert, task, start=2 * place, rank=2, seed=place), tmp_path / f"{name}.safetensors")
    pair = mb.merge([tmp_path / "sst.safetensors", tmp_path / "sts.safetensors"], "fedavg", keep_inputs=True)
    mb.save(pair, tmp_path / "pair.safetensors")
    second = mb.merge([tmp_path / "sts.safetensors", tmp_path / "para.safetensors"], "fedavg")
    mb.save(second, tmp_path / "second.safetensors")
    return tmp_path


def words(files: str, keep: str = "") -> list[str]:
    kept = [word for name in keep.split() for word in ("--keep", f"{name}.safetensors")]
    return ["merge", *(f"{name}.safetensors" for name in files.split()), *kept, "--method", "fedavg", "--out"]


REFUSED: dict[str, tuple[str, str, str]] = {
    "nothing kept": ("pair other", "", "say which with --keep pair.safetensors; pair.safetensors goes in whole: "),
    "the adapter kept": ("pair other", "other", f"give its adapters' files instead, {CHANGE}"),
    "the other way round": ("other pair", "other", "say which with --keep pair.safetensors; pair.safetensors goes in "),
    "two merges": ("pair second", "pair", "; expected one adapter per task; pair.safetensors goes in whole: "),
    "a merge without its adapters": ("second sts", "sts", "leave its sts out, give its adapters' files instead\n"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_merged_file_that_goes_in_whole_is_told_with_the_ways_out(home: Path, case: str) -> None:
    files, keep, told = REFUSED[case]
    with unchanged(home):
        done = mbert(*words(files, keep), "m.safetensors", here=home)
    assert done.code == 1
    first, second = (f"{name}.safetensors" for name in files.split())
    assert f"two adapters of it, {first} and {second}; expected one adapter per task; " in done.err
    assert told in done.err


def tasks_of(path: Path) -> dict[str, str]:
    model = mb.load(path)
    assert isinstance(model, Merged)
    return {task: str(part["sha256"]) for task, part in model.parts.items()}


def test_the_ways_out_lead_out(home: Path) -> None:
    def merged(*given: str) -> dict[str, str]:
        done = mbert(*given, "m.safetensors", "--force", here=home)
        assert done.code == 0, done.err
        return tasks_of(home / "m.safetensors")

    pair = tasks_of(home / "pair.safetensors")
    assert merged(*words("pair other", "pair")) == pair
    instead = merged(*words("other sts"))
    assert instead["sts"] == pair["sts"]
    assert instead["sst"] != pair["sst"]
    assert merged(*words("pair other sts", "other sts")) == instead
    removed = mbert("merge", "pair.safetensors", "--remove", "sst", "--out", "left.safetensors", here=home)
    assert removed.code == 0, removed.err
    assert merged(*words("left other")) == instead


def test_a_size_is_kept_to(home: Path) -> None:
    files = ("sst.safetensors", "sts.safetensors", "para.safetensors")
    done = mbert("merge", *files, "--method", "ties", "--size", "0.1", "--out", "m.safetensors", here=home)
    assert done.code == 0, done.err
    assert (home / "m.safetensors").stat().st_size <= 0.1 * 2**20
    recipe = mb.load(home / "m.safetensors").recipe  # type: ignore[union-attr]
    assert f"rank {recipe['rank']}" in done.out
    refused = mbert("merge", *files, "--size", "0.1", "--rank", "1", "--out", "n.safetensors", here=home)
    assert "--size: --rank as well; expected one of the two" in refused.err
