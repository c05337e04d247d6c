"""Registries: a new file, an entry point or a record of this session is a plug-in; wrong names get the nearest one."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mergekit_bert.errors import MbertWarning, PluginError, UnknownNameError
from mergekit_bert.registry import Registry, added_records, names_in, register, unknown
from mergekit_bert.registry import _registries as registries


@dataclass(frozen=True)
class Record:
    name: str


GROUP = "mbert.fruit-of-a-test"
PLUGIN = "from tests.test_registry import Record\nRECORD = Record({name!r})\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    found = tmp_path / "plugins_of_a_test"
    found.mkdir()
    (found / "__init__.py").write_text("")
    for name in ("banana", "apple"):
        (found / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    before = list(registries)
    yield found
    registries[:] = before
    for name in [name for name in sys.modules if name.startswith("plugins_of_a_test")]:
        del sys.modules[name]


@pytest.fixture
def registry(folder: Path) -> Registry[Record]:
    return Registry(folder.name, "fruit", Record, GROUP, taken=("basket",))


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


Install = Callable[..., None]


@pytest.fixture
def install(folder: Path) -> Install:
    """Installs a package: its module's source, and what its entry points are."""

    def run(package: str, source: str, **points: str) -> None:
        (folder.parent / f"plugins_of_a_test_{package}.py").write_text(source)
        about = folder.parent / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = plugins_of_a_test_{package}:{place}\n" for name, place in points.items()]
        (about / "entry_points.txt").write_text(f"[{GROUP}]\n{''.join(lines)}")

    return run


FRUIT = "from tests.test_registry import Record\n"


def test_another_package_adds_names_and_is_imported_when_asked(
    folder: Path, registry: Registry[Record], install: Install
) -> None:
    install("acme", f"{FRUIT}kiwi = Record('kiwi')\n", kiwi="kiwi")
    assert registry.names() == ["apple", "banana", "kiwi"] == names_in(folder.name, GROUP)
    assert registry.get("banana") == Record("banana")
    assert "plugins_of_a_test_acme" not in sys.modules
    assert registry.get("kiwi") is registry.get("kiwi") is sys.modules["plugins_of_a_test_acme"].kiwi
    assert [record.name for record in registry] == ["apple", "banana", "kiwi"]
    assert registry.added() == [Record("kiwi")]


BROKEN = {
    "an import that fails": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "a name that is gone": ("", "AttributeError: .*kiwi"),
    "code that fails": ("raise ValueError('a\\nb')", "ValueError: a b"),
    "another record": ("kiwi = 3", "fruit: a int; expected a Record"),
    "another name": (f"{FRUIT}kiwi = Record('other')", "fruit: the name 'other'; expected 'kiwi', as the entry point"),
    "a name that is none": (f"{FRUIT}kiwi = Record(None)", "fruit: the name None; expected letters"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_costs_one_warning(registry: Registry[Record], install: Install, name: str) -> None:
    source, reason = BROKEN[name]
    install("acme", source, kiwi="kiwi")
    assert "kiwi" in registry.names()
    with pytest.warns(MbertWarning, match=f"plug-in 'kiwi' of acme is left out: {reason}") as caught:
        assert [record.name for record in registry] == ["apple", "banana"]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with pytest.raises(UnknownNameError):
        registry.get("kiwi")


@pytest.mark.parametrize("name", ["apple", "basket"])
def test_a_package_cannot_take_a_name_that_exists(registry: Registry[Record], install: Install, name: str) -> None:
    install("acme", f"{FRUIT}mine = Record({name!r})\n", **{name: "mine"})
    with pytest.warns(MbertWarning, match=f"'{name}' of acme is left out: fruit '{name}': one of that name") as caught:
        assert registry.names() == ["apple", "banana"]
    assert registry.get("apple") == Record("apple")
    assert len(caught) == 1


def test_of_two_packages_with_one_name_the_first_has_it(registry: Registry[Record], install: Install) -> None:
    install("zebra", f"{FRUIT}mine = Record('kiwi')\n", kiwi="mine")
    install("acme", f"{FRUIT}mine = Record('kiwi')\n", kiwi="mine")
    with pytest.warns(MbertWarning, match="plug-in 'kiwi' of zebra is left out"):
        assert registry.get("kiwi") is not None
    assert "plugins_of_a_test_zebra" not in sys.modules


def test_a_record_of_this_session_is_added_and_can_be_written_anew(registry: Registry[Record]) -> None:
    one, two = Record("kiwi"), Record("kiwi")
    assert register(one) is one
    assert registry.get("kiwi") is one
    assert register(two) is two
    assert registry.get("kiwi") is two
    assert two in added_records()
    assert registry.names() == ["apple", "banana", "kiwi"]


REFUSED = {
    "of mbert's": (Record("apple"), "fruit 'apple': one of that name in mbert; expected a new name; rename it"),
    "that means something else": (Record("basket"), "fruit 'basket': one of that name in mbert"),
    "of an installed package": (Record("kiwi"), "fruit 'kiwi': one of that name in acme"),
    "that is no name": (Record("a b"), "fruit: the name 'a b'; expected letters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_with_a_name_is_refused(registry: Registry[Record], install: Install, name: str) -> None:
    install("acme", f"{FRUIT}mine = Record('kiwi')\n", kiwi="mine")
    record, message = REFUSED[name]
    with pytest.raises(PluginError, match=message):
        register(record)
    assert [one.name for one in registry] == ["apple", "banana", "kiwi"]


def test_what_is_no_record_is_refused(registry: Registry[Record]) -> None:
    with pytest.raises(PluginError, match=r"register: a int; expected one of .*Record.*; register a record"):
        register(3)


@pytest.mark.parametrize("first", ["import", "name"])
def test_a_module_may_register_what_its_entry_point_names(
    registry: Registry[Record], install: Install, first: str
) -> None:
    install(
        "acme",
        f"from mergekit_bert.registry import register\n{FRUIT}mine = register(Record('kiwi'))\n",
        kiwi="mine",
    )
    assert "kiwi" in registry.names()
    if first == "import":
        __import__("plugins_of_a_test_acme")
    assert registry.get("kiwi") is sys.modules["plugins_of_a_test_acme"].mine
    assert registry.names().count("kiwi") == 1
