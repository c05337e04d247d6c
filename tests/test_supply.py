"""The supply chain: what is declared, pinned and locked agrees, and the wheel holds the package alone."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = "mergekit_bert"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = [Requirement(line) for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
BUILD = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
DECLARED = [*RUNTIME, *EXTRAS, *BUILD]
CUDA = ("cuda-", "nvidia-", "triton")
"""What torch brings depending on the machine; like torch itself, it has no hashes."""


def lines_of(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def pin(line: str) -> tuple[str, str]:
    found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
    assert found, f"not a pin: {line}"
    return canonicalize_name(found[1]), found[2]


def unique(pins: list[tuple[str, str]]) -> dict[str, str]:
    assert len(dict(pins)) == len(pins), "a package is pinned twice"
    return dict(pins)


PINS = unique([pin(line) for line in lines_of("constraints.txt")])


def test_the_lock_has_every_pin_but_torch() -> None:
    locked = unique([pin(line.removesuffix(" \\")) for line in lines_of("requirements.lock") if line[0] != " "])
    assert locked == {name: version for name, version in PINS.items() if name != "torch"}, "run make lock"


def test_the_lock_has_nothing_but_pins_and_their_hashes() -> None:
    for entry in "\n".join(lines_of("requirements.lock")).replace(" \\\n", "").splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.!+]+( +--hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("name", ["constraints.txt", "requirements.lock", "Makefile", ".ci/run"])
def test_no_package_index_is_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|index-url|find-links|trusted-host|pypi|pythonhosted", text)


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_a_declared_dependency_is_pinned_to_a_version_that_fits(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def needed() -> set[str]:
    """Every package that the declared ones need here, themselves included, as the installed packages say."""
    found: set[str] = set()
    waiting = [(requirement, extra) for requirement in DECLARED for extra in ("", *requirement.extras)]
    visited = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in visited or (name.startswith(CUDA) and name != "nvidia-ml-py"):
            continue
        visited.add((name, extra))
        found.add(name)
        for line in metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                waiting += [(inner, wanted) for wanted in ("", *inner.extras)]
    return found


def test_what_is_needed_is_pinned_and_nothing_else() -> None:
    assert needed() == set(PINS)


def third_party(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if (top := name.split(".")[0]) not in {*sys.stdlib_module_names, PACKAGE}:
                yield top


def test_what_the_package_imports_is_declared() -> None:
    distributions = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in [*RUNTIME, *EXTRAS]}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        for module in third_party(ast.parse(path.read_text(encoding="utf-8"))):
            owners = {canonicalize_name(name) for name in distributions[module]}
            assert owners & declared, f"{path.name} imports {module}, of {owners}"


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in (PACKAGE, "tests", "benchmarks", "examples", "adapters", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / PACKAGE / "left_behind.safetensors").touch()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        information = {name.split("/", 1)[1] for name in wheel.namelist() if ".dist-info/" in name}
    package = ROOT / PACKAGE
    files = {path.relative_to(ROOT).as_posix() for path in [*package.rglob("*.py"), package / "py.typed"]}
    assert inside == files
    assert information == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
