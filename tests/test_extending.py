"""docs/extending.md: every example on it is a plug-in that keeps to what mbert's own keep to."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import mergekit_bert as mb
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.composing import source
from mergekit_bert.composing.method import METHODS
from mergekit_bert.errors import PluginError, UnknownNameError
from mergekit_bert.models.composition import Merged
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter
from tests.cli.command import mbert
from tests.corpus import write_corpus
from tests.tiny import tiny_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)( continued)?\n(.*?)```", re.DOTALL)
SECTIONS = {
    section.partition("\n")[0]: [(language, bool(more), text) for language, more, text in BLOCK.findall(section)]
    for section in PAGE.removeprefix("# ").split("\n## ")
}
BATTERY = {
    "A merge method": ("test_methods.py", "median", 15),
    "A task": ("test_tasks.py", "headlines", 10),
    "A kind of task": ("test_kinds.py", "ordinal", 13),
    "A family of adapters": ("test_families.py", "scaled", 30),
    "A family with options of its own": ("test_families.py", "gains", 30),
    "A head": ("test_heads.py", "beside", 5),
}
"""The checks of each example, its name, and how many of them there are at least."""


def example(section: str) -> str:
    """The module on a page."""
    (found,) = [text for language, more, text in SECTIONS[section] if language == "python" and not more]
    return found


def run(*words: str, paths: tuple[Path, ...] = (), here: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which finds modules in ``paths``."""
    found = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


COMMANDS = """
import json, sys
from tests.cli.command import mbert
print(json.dumps([vars(mbert(*words)) for words in json.loads(sys.argv[1])]))
"""


def test_every_page_has_its_checks() -> None:
    assert {name for name, blocks in SECTIONS.items() if any(one[0] == "python" for one in blocks)} == set(BATTERY)


def test_a_method_takes_few_lines() -> None:
    assert len([line for line in example("A merge method").splitlines() if line.strip()]) <= 15


def test_the_examples_keep_to_what_every_plugin_does(tmp_path: Path) -> None:
    modules = []
    for place, section in enumerate(BATTERY):
        (tmp_path / f"my_plugin_{place}.py").write_text(example(section))
        modules += ["-p", f"my_plugin_{place}"]
    modules += ["-p", "tests.contracts.choice"]
    expected = [*BATTERY.values(), ("test_kinds.py", "choice", 13)]
    chosen = " or ".join(f"({file} and {name})" for file, name, _ in expected)
    words = ("-m", "pytest", "tests/contracts", *modules, "-k", chosen, "-n", "0", "-vv")
    done = run(*words, paths=(tmp_path,))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    table = done.stdout.rpartition("checks of each plug-in")[2]
    for file, name, least in expected:
        passed = [line for line in done.stdout.splitlines() if file in line and f"{name}" in line and "PASSED" in line]
        assert len(passed) >= least, (file, passed)
        (line,) = [line for line in table.splitlines() if line.split()[1:2] == [name]]
        assert str(len([one for one in passed if "[" in one])) in line.split()[2:], (line, passed)


@pytest.fixture
def here(bert: mb.Encoder, tmp_path: Path) -> Path:
    """A folder with adapters of two tasks."""
    write_adapter(tmp_path / "sst.safetensors", random_adapter(bert, "sst"))
    write_adapter(tmp_path / "sts.safetensors", random_adapter(bert, "sts", start=3))
    return tmp_path


def test_a_merge_in_a_notebook_is_read_where_there_is_no_such_method(bert: mb.Encoder, here: Path) -> None:
    cells = [text for language, _, text in SECTIONS["A merge method"] if language == "python"]
    done = run("-c", "\n".join(cells), here=here)
    assert done.stdout == "median ['sst', 'sts']\n", done.stderr
    with pytest.raises(UnknownNameError, match="merge method: 'median'"):
        mb.merge([here / "sst.safetensors"], "median")
    merged = mb.load(here / "merged.safetensors")
    assert isinstance(merged, Merged)
    assert (merged.method, merged.recipe["options"]) == ("median", {"quantile": 0.4})
    deltas = {name: random_adapter(bert, name, start=start).deltas() for name, start in (("sst", 0), ("sts", 3))}
    for site, delta in merged.deltas.items():
        each = np.stack([found[site].dense().numpy() for found in deltas.values()])
        expected = (np.quantile(each, 0.4, axis=0) + np.quantile(each, 0.6, axis=0)) / 2
        np.testing.assert_allclose(delta.dense(), expected, atol=1e-6)
    assert np.isfinite(Predictor(merged, bert).outputs("sst", tiny_rows(mb.get_task("sst"), 4))).all()
    assert "median" in mbert("inspect", "merged.safetensors", here=here).out
    again = mb.merge([merged], "task_arithmetic", {"sst+sts": 1.0})
    assert isinstance(again, Merged)
    for site, delta in merged.deltas.items():
        np.testing.assert_allclose(again.deltas[site].dense(), delta.dense(), atol=1e-7)


def test_an_installed_package_is_listed_and_merges(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the entry point on the page says, beside one that is broken."""
    place = tmp_path_factory.mktemp("site")
    (toml,) = [text for language, _, text in SECTIONS["Extending mbert"] if language == "toml"]
    ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
    ((name, target),) = points.items()
    module = place / f"{target.partition(':')[0].replace('.', '/')}.py"
    module.parent.mkdir()
    (module.parent / "__init__.py").write_text("")
    module.write_text(example("A merge method"))
    about = place / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\nmean = my_package.gone:mean\n")

    files = ("sst.safetensors", "sts.safetensors")
    commands = (
        ("methods",),
        ("merge", "--help"),
        ("merge", *files, "--method", "median", "--set", "quantile=0.4", "--out", "m.safetensors"),
        ("doctor", *files, "--methods", "median"),
    )
    done = run("-c", COMMANDS, json.dumps(commands), paths=(place,), here=here)
    assert done.returncode == 0, done.stderr
    listed, helped, merged, tried = json.loads(done.stdout)
    assert "the median of the weighted Deltas" in listed["out"]
    broken = "note: plug-in 'mean' of my-package is left out: ModuleNotFoundError: No module named 'my_package.gone'\n"
    assert (listed["code"], listed["err"]) == (0, broken)
    assert "mean, median," in helped["out"]
    assert (merged["code"], merged["err"]) == (0, "")
    assert tried["code"] == 0, tried
    assert "median" in tried["out"]
    found = mb.load(here / "m.safetensors")
    assert isinstance(found, Merged)
    assert found.method == "median"


def installed(place: Path, group: str, name: str, section: str) -> Path:
    """A folder that has the example of ``section`` as an installed package with one entry point."""
    (place / "my_package").mkdir()
    (place / "my_package/__init__.py").write_text("")
    (place / f"my_package/{name}.py").write_text(example(section))
    about = place / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = my_package.{name}:{name}\n")
    return place


def test_a_family_of_a_package_goes_the_whole_way_on_the_command_line(
    tiny_folders: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Trained with an option that mbert has no flag for, inspected, merged with a LoRA, and answering beside it."""
    place = installed(tmp_path_factory.mktemp("site"), "mbert.families", "gains", "A family with options of its own")
    write_corpus(tmp_path / "data", ("sst", "sts"))
    quick = ("--epochs", "1", "--batch-size", "8", "--hold-out", "0.2", "--precision", "fp32")
    base = ("--base", str(tiny_folders["bert"]))
    train = ("train-adapter", *base, *quick, "--task")
    gains = ("sst", "--type", "gains", "--targets", "qv")
    commands = (
        (*train, *gains, "--set", "group=4"),
        (*train, "sts", "--rank", "2"),
        ("inspect", "adapters/sst.safetensors"),
        ("merge", "adapters/sst.safetensors", "adapters/sts.safetensors", "--method", "fedavg", *base),
        ("merge", "--method", "ensemble", "--out", "all.safetensors", *base),
        ("eval", "merged.safetensors", *base),
        ("predict", "all.safetensors", "--task", "sst", "good film", *base),
        (*train, *gains, "--set", "groups=4", "--out", "x"),
        (*train, *gains, "--set", "group=0", "--out", "x"),
        (*train, *gains, "--set", "group=many", "--out", "x"),
        (*train, *gains, "--set", "targets=qkv", "--out", "x"),
        (*train, *gains, "--set", "group", "--out", "x"),
        (*train, "sst", "--type", "bitfit", "--set", "group=4", "--out", "x"),
    )
    done = run("-c", COMMANDS, json.dumps(commands), paths=(place,), here=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [one["code"] for one in results] == [0] * 7 + [1] * 6, results
    assert re.search(r"group\s+4", results[2]["out"])
    messages = (
        "option of gains: 'groups'; expected one of targets, group; did you mean 'group'?",
        "group: 0; expected a whole number of at least 1",
        "--group of GainOptions: 'many' (str); expected ",
        "--targets: given here and in --set; expected one of the two; drop one",
        "--set: 'group'; expected NAME=VALUE, each name once",
        "option 'group' of bitfit: no such option; expected none: it has no options",
    )
    for message, one in zip(messages, results[7:], strict=True):
        assert message in one["err"], one


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("share", "the parameter 'share' as share; expected a type"),
        ("share: float", "the parameter 'share' as share: float; expected a type"),
        ("share: list = ()", "the parameter 'share' as share: list"),
        ("share=0.5", "the parameter 'share' as share=0.5"),
    ],
)
def test_an_option_needs_a_type_and_a_default(parameter: str, message: str) -> None:
    text = f"@mb.method(name='x', description='y')\ndef x(site, {parameter}): ...\n"
    with pytest.raises(PluginError, match=re.escape(f"merge method 'x': {message}")):
        exec(text, {"mb": mb})


@pytest.mark.parametrize("name", ["ties", "ensemble"])
def test_a_method_may_not_be_called_like_one_of_mberts_own(name: str) -> None:
    with pytest.raises(PluginError, match=f"merge method '{name}': one of that name in mbert; .*; rename it"):
        exec(example("A merge method").replace('name="median"', f'name="{name}"'), {"__name__": "__main__"})


def test_kept_work_knows_the_source_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method has made is not taken up once its source is another; without one, not by another session."""
    monkeypatch.setattr(METHODS, "_added", {})
    assert "plugins" not in source.made_by()

    def key(change: str = "") -> str:
        path = tmp_path / f"my_plugin{len(change)}.py"
        path.write_text(example("A merge method") + change)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return source.made_by()["plugins"]

    assert key() == key() != key("# another\n")
    exec(example("A merge method"), {"__name__": "a_notebook"})
    here = source.made_by()["plugins"]
    assert here == source.made_by()["plugins"]
    monkeypatch.setattr(source, "_SESSION", "another")
    assert source.made_by()["plugins"] != here
