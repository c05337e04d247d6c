"""The reference of the Python interface is what the docstrings say, and the README's lines of Python run."""

import re
import runpy
from pathlib import Path

import pytest

import mergekit_bert as mb

ROOT = Path(__file__).parent.parent


def test_the_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_api.py"))["reference"]()
    assert made == (ROOT / "docs/api.md").read_text(encoding="utf-8"), "run `python docs/make_api.py`"
    assert all(f"### `{name}`" in made for name in mb.__all__)


def test_the_readmes_lines_run(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.py").write_text(block.replace('"minilm"', repr(str(tiny_folders["bert"]))))
    found = runpy.run_path("lines.py")
    assert found["answer"].label in ("poor", "good")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.py", "m.safetensors"]
