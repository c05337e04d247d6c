"""A DoRA from training to a merge, through the command line: its Deltas need the base, which the file alone has not."""

import json
from pathlib import Path

import pytest

from tests.cli.command import mbert
from tests.corpus import write_corpus

QUICK = ("--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--precision", "fp32", "--rank", "3")


@pytest.fixture(scope="module")
def home(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DoRA of sst and a LoRA of sts, trained on one base."""
    folder = tmp_path_factory.mktemp("dora")
    write_corpus(folder / "data", ("sst", "sts"))
    for task, kind in (("sst", "dora"), ("sts", "lora")):
        words = ("train-adapter", "--task", task, "--type", kind, "--base", tiny_folders["bert"], *QUICK)
        done = mbert(*words, here=folder)
        assert done.code == 0, done.err
    return folder


def test_it_trains_without_a_basis_and_refuses_one(home: Path, tiny_folders: dict[str, Path]) -> None:
    told = json.loads(mbert("inspect", "adapters/sst.safetensors", "--json", here=home).out)["parts"]["sst"]
    assert (told["type"], told["config"]["basis"], told["basis"]) == ("dora", "random", None)
    assert "sst" not in (home / "adapters/basis.json").read_text()
    words = ("train-adapter", "--task", "sst", "--type", "dora", "--basis", "orthogonal", "--out", "x.safetensors")
    done = mbert(*words, "--base", tiny_folders["bert"], here=home)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "--basis: an option that --type dora does not have; expected one of rank, alpha" in done.err
    assert not (home / "x.safetensors").exists()


def test_inspect_shows_what_the_file_says_and_no_norm_that_it_does_not(home: Path) -> None:
    done = mbert("inspect", "adapters/sst.safetensors", here=home)
    assert done.code == 0, done.err
    assert "dora" in done.out
    sites = json.loads(mbert("inspect", "adapters/sst.safetensors", "--json", here=home).out)["sites"]
    assert {(one["rank"], one["norm"]) for one in sites.values()} == {(None, None)}


@pytest.mark.parametrize("more", [(), ("--keep-inputs",), ("--rank", "4"), ("--method", "ensemble")])
def test_it_merges_with_a_lora_and_is_scored(home: Path, more: tuple[str, ...]) -> None:
    done = mbert("merge", "adapters/sst.safetensors", "adapters/sts.safetensors", *more, "--force", here=home)
    assert done.code == 0, done.err
    done = mbert("eval", "merged.safetensors", here=home)
    assert done.code == 0, done.err
    (home / "rows.tsv").write_text("task\ttext\ttext2\nsst\tgood film\t\nsts\ta cat\ta dog\n")
    if "--keep-inputs" in more:
        words = ("merge", "merged.safetensors", "--remove", "sts", "--out", "left.safetensors", "--force")
        assert mbert(*words, here=home).code == 0


def test_without_a_base_that_may_be_followed_the_merge_asks_for_one(
    home: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    from mergekit_bert.adapters.file import read_adapter, write_adapter

    one = read_adapter(home / "adapters/sst.safetensors")
    write_adapter(tmp_path / "sst.safetensors", replace(one, base=replace(one.base, name="somebody/elses")))
    done = mbert("merge", tmp_path / "sst.safetensors", here=tmp_path)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "name it with --base" in done.err
    done = mbert("merge", tmp_path / "sst.safetensors", "--base", tiny_folders["bert"], here=tmp_path)
    assert done.code == 0, done.err
    other = mbert("merge", tmp_path / "sst.safetensors", "--base", tiny_folders["roberta"], "--force", here=tmp_path)
    assert (other.code, other.err.count("\n")) == (1, 1)
    assert "give the --base it was trained on" in other.err


def test_it_becomes_a_peft_folder_and_comes_back(home: Path) -> None:
    assert mbert("convert", "adapters/sst.safetensors", "--to", "peft", "--out", "p", here=home).code == 0
    assert json.loads((home / "p/adapter_config.json").read_text())["use_dora"] is True
    assert mbert("convert", "p", "--to", "mbert", "--out", "back.safetensors", here=home).code == 0
    assert (home / "back.safetensors").read_bytes() == (home / "adapters/sst.safetensors").read_bytes()
    assert mbert("convert", "p", "--to", "hf", "--out", "whole", here=home).code == 0
    for file in ("adapters/sst.safetensors", "whole/sst"):
        assert mbert("predict", file, "good film", here=home).code == 0
