"""Fixtures of several files: adapters, rows of their tasks, and the merges that were made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.evaluation import merge_results, method_comparison
from tests.adapters.helpers import random_adapter
from tests.composing.helpers import trio
from tests.corpus import write_corpus


@pytest.fixture
def quick_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps of few resamples."""
    monkeypatch.setattr(method_comparison, "RESAMPLES", 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of three tasks."""
    write_corpus(tmp_path / "data", ("sst", "sts", "para"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def three(bert: Encoder) -> list[Adapter]:
    """Adapters of these tasks."""
    return trio(bert, targets="qv")


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the merges that were made, in their order; a KeyboardInterrupt comes where "stop" is in it."""
    made = list[str]()

    def counted(really: Callable[..., Any]) -> Callable[..., Any]:
        def count(merge_inputs: Any, recipe: Any, given: Any = None) -> Any:
            made.append(recipe.method)
            if "stop" in made and len(made) == 4:
                raise KeyboardInterrupt
            return really(merge_inputs, recipe, given)

        return count

    for name in ("merge", "merge_weights"):
        monkeypatch.setattr(merge_results, name, counted(getattr(merge_results, name)))
    return made


@pytest.fixture(scope="module")
def home(bert: Encoder, tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of two tasks and their rows."""
    folder = tmp_path_factory.mktemp("home")
    write_corpus(folder / "data", ("sst", "sts"), train=40, dev=12)
    for task in ("sst", "sts"):
        for split in ("train", "dev"):
            texts = mb.load_rows(get_task(task), split, folder / "data").hashes()
            assert len(set(texts)) == len(texts), "else rows are told apart by less than their texts"
    for place, task in enumerate(("sst", "sts")):
        mb.save(random_adapter(bert, task, start=4 * place), folder / f"adapters/{task}.safetensors")
    return folder
