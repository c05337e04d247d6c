"""The layout: which module may import which, what no module does, and which imports stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_bert

PACKAGE = "mergekit_bert"
ROOT = Path(mergekit_bert.__file__).parent
BASE_MODULES = (
    *("text", "errors", "registry", "documents", "strict", "schema", "patterns"),
    *("files", "tensorfile", "outputs", "hardware", "option", "terminal", "progress"),
    *("arguments", "model_methods"),
)
SUBPACKAGES = ("data", "encoder", "adapters", "models", "training", "composing", "formats", "evaluation")
UPPER_LAYER = ("__init__", "__main__", "request", "api", "quickstart", "cli")
LOOKS_UP = {"model_methods": {"__init__"}}
"""The methods of models are public functions, which are looked up in the package when they are called."""
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PACKAGES = {module_name(path) for path in FILES if path.name == "__init__.py"}


def unit(module: str) -> str:
    """The subpackage, base module or upper-layer module that ``module`` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(module: str) -> Iterator[str]:
    """Every module named in an import anywhere in ``module``, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in TREES else node.module


def own_imports(module: str) -> set[str]:
    return {name for name in imported(module) if name.split(".")[0] == PACKAGE}


GRAPH = {module: own_imports(module) for module in TREES}


def test_every_module_belongs_to_a_layer() -> None:
    known = {*BASE_MODULES, *SUBPACKAGES, *UPPER_LAYER}
    assert {unit(module) for module in TREES} <= known
    assert set(SUBPACKAGES) <= {unit(module) for module in TREES}


def test_a_module_imports_only_from_lower_layers() -> None:
    wrong = {}
    for module, names in GRAPH.items():
        layer = unit(module)
        if layer in UPPER_LAYER:
            continue
        if layer in BASE_MODULES:
            allowed = {*BASE_MODULES, *LOOKS_UP.get(layer, ())}
        else:
            allowed = {*BASE_MODULES, *SUBPACKAGES[: SUBPACKAGES.index(layer) + 1]}
        if forbidden := {name for name in names if unit(name) not in allowed}:
            wrong[module] = forbidden
    assert wrong == {}


def test_there_are_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"an import cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for other in sorted(GRAPH[module] & set(TREES)):
            # The package's own __init__ loads lazily; so importing through it is no cycle.
            if other != PACKAGE and module != PACKAGE:
                visit(other, (*path, module))
        done.add(module)

    for module in sorted(TREES):
        visit(module, ())


def test_every_imported_module_of_the_package_exists() -> None:
    assert {name for names in GRAPH.values() for name in names} <= set(TREES)


GLOBAL_STATE = {
    "manual_seed",
    "manual_seed_all",
    "seed_all",
    "set_num_threads",
    "set_num_interop_threads",
    "set_default_dtype",
    "set_default_device",
    "set_default_tensor_type",
    "use_deterministic_algorithms",
    "set_deterministic_debug_mode",
    "set_float32_matmul_precision",
    "set_grad_enabled",
    "set_rng_state",
    "set_flush_denormal",
    "set_printoptions",
    "set_seed",
    "enable_full_determinism",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def called(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def test_no_module_but_hardware_touches_torchs_global_state() -> None:
    found = [
        (module, name) for module in TREES for name, _ in called(module) if name.rpartition(".")[2] in GLOBAL_STATE
    ]
    found += [
        (module, dotted(target))
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if dotted(target).startswith("torch.")
    ]
    assert {module for module, _ in found} == {f"{PACKAGE}.hardware"}, found


RANDOM = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal")


def test_torchs_random_numbers_come_from_a_generator_that_is_named() -> None:
    unnamed = [
        (module, dotted(node.func), node.lineno)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and dotted(node.func).rpartition(".")[2].removesuffix("_") in RANDOM
        and dotted(node.func).startswith(("torch.", "?", "nn."))
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert unnamed == []


def test_only_tensorfile_opens_weight_files() -> None:
    openers = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "safetensors"
        and alias.name != "SafetensorError"  # what others read may fail with it
    }
    assert openers == {f"{PACKAGE}.tensorfile"}


def test_only_terminal_prints() -> None:
    ways = {"print", "sys.stdout.write", "sys.stderr.write", "Console", "typer.echo", "typer.secho"}
    printers = {module for module in TREES for name, _ in called(module) if name in ways}
    assert printers == {f"{PACKAGE}.terminal"}


def test_nothing_runs_what_a_file_says() -> None:
    modules = {name.split(".")[0] for module in TREES for name in imported(module)}
    assert modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} == set()
    calls = {name for module in TREES for name, _ in called(module)}
    assert calls & {"eval", "exec", "compile", "torch.load", "torch.save", "yaml.load", "np.load"} == set()
    options = {
        (keyword.arg, ast.unparse(keyword.value))
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    }
    assert options & {"allow_pickle", "weights_only"} == set()


LOADER = f"{PACKAGE}.encoder.pretrained"


def test_only_one_module_loads_from_transformers_and_it_never_trusts_code() -> None:
    opened = {
        module: [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
        for module in TREES
        if {name.rpartition(".")[2] for name, _ in called(module)} & {"from_pretrained", "from_config", "from_dict"}
    }
    assert set(opened) == {LOADER}
    loads = [
        node for node in opened[LOADER] if dotted(node.func).rpartition(".")[2] in ("from_pretrained", "from_config")
    ]
    assert len(loads) == 3
    arguments = [{keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords} for node in loads]
    assert [given["trust_remote_code"] for given in arguments] == [False] * 3
    assert [given["use_safetensors"] for given in arguments if "state_dict" in given] == [True]


def test_only_one_function_follows_the_name_of_a_base_in_a_file() -> None:
    loaders = ("load_encoder", "open_encoder", "open_base", "base_folder", "_encoder")
    followed = {
        (module, node.lineno)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in loaders
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and inner.attr in ("base", "base_name")
    }
    assert followed == set()


def test_user_input_does_not_reach_a_bare_exit() -> None:
    exits = {module for module in TREES for name, _ in called(module) if name in ("sys.exit", "exit", "quit")}
    assert exits == {f"{PACKAGE}.cli"}


def test_the_version_is_written_in_one_place() -> None:
    project = ROOT.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("not run from a source tree")
    import tomllib

    version = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    holders = [path.name for path in FILES if version in path.read_text(encoding="utf-8").replace("==" + version, "")]
    assert holders == []
    assert project.read_text(encoding="utf-8").count(f'version = "{version}"') == 1


LIGHT = """
import sys
{code}
heavy = {{"torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "re2", "mergekit_bert.schema"}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import mergekit_bert; mergekit_bert.__all__",
        "from mergekit_bert import MbertError, TrainConfig, AdapterConfig",
        "from typer.testing import CliRunner; from mergekit_bert.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "from typer.testing import CliRunner; from mergekit_bert.cli import app; "
        "assert CliRunner().invoke(app, ['train-adapter', '--help']).exit_code == 0",
    ],
    ids=["import", "configs", "help", "help of a command"],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code=code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "HEAVY []"


def test_every_public_name_is_there() -> None:
    for name in mergekit_bert.__all__:
        assert getattr(mergekit_bert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mergekit_bert.nonsense  # noqa: B018


def compared(node: ast.AST) -> list[ast.expr]:
    """What a comparison or a match statement looks at."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    return [node.subject] if isinstance(node, ast.Match) else []


def test_no_module_asks_which_kind_a_task_is_of() -> None:
    """Comparisons of ``.kind`` stand where kinds are looked up, and nowhere else."""
    allowed = (f"{PACKAGE}.data.kind", f"{PACKAGE}.data.kinds", f"{PACKAGE}.data.task")
    asking = {
        (module, node.lineno)
        for module, tree in TREES.items()
        if not f"{module}.".startswith(tuple(f"{name}." for name in allowed))
        for node in ast.walk(tree)
        for side in compared(node)
        if isinstance(side, ast.Attribute) and side.attr == "kind"
    }
    assert asking == set()


def test_no_module_asks_which_delta_or_which_options_it_has() -> None:
    """Families know their options, ``adapters.delta`` its two forms; others ask the object itself."""
    kinds = {"LowRank", "Dense", "LowRankOptions", "AdapterConfig", "VirtualOptions", "PrefixOptions", "PromptOptions"}
    allowed = (f"{PACKAGE}.adapters.delta", f"{PACKAGE}.adapters.families", f"{PACKAGE}.adapters.config")
    asking = {
        (module, node.lineno)
        for module, tree in TREES.items()
        if not f"{module}.".startswith(tuple(f"{name}." for name in allowed))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("isinstance", "issubclass")
        if kinds & {dotted(name).rpartition(".")[2] for name in ast.walk(node.args[1])}
    }
    assert asking == set()


def test_no_module_asks_which_model_it_has() -> None:
    models = {"Adapter", "Merged", "Ensemble", "FullModel", "MergeInput", "Composition", "Patched"}
    asking = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("isinstance", "issubclass")
        if models & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
    }
    assert asking == {f"{PACKAGE}.models.composition"}
