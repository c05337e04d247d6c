"""What a merge owes to the code: the source that decides its answers, and no other."""

from pathlib import Path

import pytest
import torch

from mergekit_bert.composing import source
from mergekit_bert.composing.source import made_by


def test_it_names_versions_and_is_the_same_again() -> None:
    assert made_by() == source._program.__wrapped__()
    assert set(made_by()) == {"source", "torch", "transformers", "processor"}
    assert made_by()["torch"] == torch.__version__


def test_it_changes_with_the_deciding_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "__file__", str(tmp_path / "composing/source.py"))
    for name in (
        "hardware.py",
        "data/a.py",
        "encoder/a.py",
        "adapters/a.py",
        "models/a.py",
        "training/loop.py",
        "composing/methods/a.py",
        "formats/a.py",
        "evaluation/a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    before = source._program.__wrapped__()
    (tmp_path / "evaluation/a.py").write_text("two")
    assert source._program.__wrapped__() == before
    for name in ("hardware.py", "models/a.py", "training/loop.py", "composing/methods/a.py", "formats/a.py"):
        (tmp_path / name).write_text("two")
        assert source._program.__wrapped__() != before
        before = source._program.__wrapped__()
