"""Registries: a new file is a new plug-in, and a wrong name is told with the nearest right one."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mergekit_bert.errors import UnknownNameError
from mergekit_bert.registry import Registry, names_in, unknown


@dataclass(frozen=True)
class Record:
    name: str


PLUGIN = "from tests.test_registry import Record\nRECORD = Record({name!r})\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    found = tmp_path / "plugins_of_a_test"
    found.mkdir()
    (found / "__init__.py").write_text("")
    for name in ("banana", "apple"):
        (found / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    for name in [name for name in sys.modules if name.startswith("plugins_of_a_test")]:
        del sys.modules[name]


@pytest.fixture
def registry(folder: Path) -> Registry[Record]:
    return Registry(folder.name, "fruit", Record)


def test_names_are_sorted_and_import_no_plugin(folder: Path, registry: Registry[Record]) -> None:
    (folder / "broken.py").write_text("raise RuntimeError")
    assert names_in(folder.name) == registry.names() == ["apple", "banana", "broken"]
    assert not any(name.startswith(f"{folder.name}.") for name in sys.modules)


def test_records_come_by_name_and_in_order(registry: Registry[Record]) -> None:
    assert registry.get("banana") == Record("banana")
    assert [record.name for record in registry] == ["apple", "banana"]


def test_a_new_file_is_found(folder: Path, registry: Registry[Record]) -> None:
    (folder / "cherry.py").write_text(PLUGIN.format(name="cherry"))
    assert registry.get("cherry") == Record("cherry")


@pytest.mark.parametrize(
    ("name", "remedy"), [("bananna", "did you mean 'banana'?"), ("zzz", "choose one fruit of that list")]
)
def test_an_unknown_name_is_told_with_what_there_is(registry: Registry[Record], name: str, remedy: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.get(name)
    assert str(caught.value) == f"fruit: {name!r}; expected one of apple, banana; {remedy}"


@pytest.mark.parametrize("text", ["RECORD = 1", PLUGIN.format(name="other")])
def test_a_plugin_with_a_wrong_record_is_a_programmer_s_error(
    folder: Path, registry: Registry[Record], text: str
) -> None:
    (folder / "wrong.py").write_text(text)
    with pytest.raises(TypeError, match=r"wrong\.RECORD must be a Record named 'wrong'"):
        registry.get("wrong")


def test_the_error_can_be_made_for_any_list_of_names() -> None:
    assert "did you mean 'fp32'?" in str(unknown("precision", "fp23", ["fp32", "bf16"]))
