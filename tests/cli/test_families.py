"""Families through the command line: a sum, one without weights, and options that are not a family's."""

import re
from pathlib import Path

import pytest

from tests.cli.command import mbert
from tests.corpus import write_corpus

QUICK = ("--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--precision", "fp32")


@pytest.fixture(scope="module")
def home(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sum of families for sst and biases alone for sts, trained on one base."""
    folder = tmp_path_factory.mktemp("families")
    write_corpus(folder / "data", ("sst", "sts"))
    for task, *kind in (("sst", "--type", "bitfit+loha", "--rank", "3"), ("sts", "--type", "bitfit")):
        done = mbert("train-adapter", "--task", task, *kind, "--base", tiny_folders["bert"], *QUICK, here=folder)
        assert done.code == 0, done.err
        assert re.search(r"parameters \(\d+\.\d\d %\)", done.out)
    return folder


def test_inspect_shows_the_share_that_was_trained(home: Path) -> None:
    for task, kind in (("sst", r"loha\+bitfit"), ("sts", "bitfit")):
        done = mbert("inspect", f"adapters/{task}.safetensors", here=home)
        assert done.code == 0, done.err
        assert re.search(rf"type\s+{kind}\b", done.out)
        assert re.search(r"trained\s+[\d,]+ of [\d,]+ parameters \(\d+\.\d\d %\)", done.out)


def test_they_merge_and_are_scored_and_become_whole_models(home: Path) -> None:
    for words in (("merge",), ("eval", "merged.safetensors"), ("convert", "merged.safetensors", "--to", "hf")):
        done = mbert(*words, *(("--out", "whole") if words[0] == "convert" else ()), here=home)
        assert done.code == 0, done.err
    assert mbert("predict", "whole/sst", "good film", here=home).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bitfit", "--rank", "3"), "--rank: an option that --type bitfit does not have; expected no options"),
        (
            ("loha", "--basis", "orthogonal"),
            "--basis: an option that --type loha does not have; expected one of rank, alpha",
        ),
        (("lora+dora",), r"--type dora\+lora: dora and lora, which both adapt linear layers"),
        (("lora+bitfot",), "adapter type: 'bitfot'; .*did you mean 'bitfit'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    home: Path, tiny_folders: dict[str, Path], words: tuple[str, ...], message: str
) -> None:
    base = ("--base", tiny_folders["bert"], "--out", "x.safetensors")
    done = mbert("train-adapter", "--task", "sst", "--type", *words, *base, here=home)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert re.search(message, done.err)
    assert not (home / "x.safetensors").exists()
