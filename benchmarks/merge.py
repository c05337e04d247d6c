"""Merging speed and memory beside PEFT and mergekit: same tensors, same rank, equal results, every run its own process.

Usage: python -m benchmarks.merge [--quick] [--large] [--mergekit PYTHON]

Models and adapters are random, of BERT's shapes: the time of a merge does not depend on what they learned. Seconds are
counted after the imports; peak memory is the operating system's. ``PYTHON`` is the interpreter of an environment with
mergekit, whose pins differ from the project's: ``python -m venv E; E/bin/pip install torch mergekit``.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import provenance, write_result

RANK = 16
DENSITY = 0.25
"""Of sides that are powers of two or three times one, a whole number of entries: so that nobody rounds otherwise."""
SHAPES = {"quick": (3, 768, 3072), "base": (12, 768, 3072), "large": (24, 1024, 4096)}
LAYER = r"encoder\.layer\.0\..*"
PEFT = {"fedavg": "svd", "ties": "ties_svd"}
MERGEKIT = {"fedavg": "linear", "ties": "ties"}
SPACES = ("tsv", "iso_c")


# --- what is merged ---------------------------------------------------------------------------------------------------


def make_base(folder: Path, size: str) -> Path:
    """A random BERT and a tokenizer with as many words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    layers, width, inner = SHAPES[size]
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=width // 64,
        num_labels=5,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))}
    words |= {f"w{number}": number for number in range(len(words), config.vocab_size)}
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **named, model_max_length=512).save_pretrained(folder)
    return folder


def make_adapters(folder: Path, base: Path, count: int, targets: str) -> None:
    """Random LoRA adapters, as files of mbert's (``mbert/``) and as PEFT folders (``peft/``) of the same tensors."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    import mergekit_bert as mb
    from mergekit_bert.adapters.adapter import Adapter
    from mergekit_bert.adapters.file import write_adapter
    from mergekit_bert.encoder.load import Base
    from mergekit_bert.encoder.sites import find_sites
    from mergekit_bert.encoder.stored import open_encoder

    encoder = open_encoder(base)
    sites, sst = find_sites(encoder, targets), mb.get_task("sst")
    config = mb.AdapterConfig(rank=RANK, alpha=float(RANK), basis="random", targets=targets)
    for number in range(count):
        source = torch.Generator().manual_seed(number)
        tensors = {
            site: {
                "B": 0.02 * torch.randn(out, RANK, generator=source),
                "A": torch.randn(RANK, inner, generator=source) / inner**0.5,
            }
            for site, (out, inner) in sites.items()
        }
        head = {"classifier.weight": torch.zeros(5, encoder.config.hidden_size), "classifier.bias": torch.zeros(5)}
        task = dataclasses.replace(sst, name=f"t{number}", hub=None)
        write_adapter(
            folder / "mbert" / f"t{number}.safetensors",
            Adapter("lora", config, task, Base.of(encoder), 512, sites, tensors, {}, head, None, {"examples": 100}, {}),
        )
        path = folder / "peft" / f"t{number}"
        names = {"A": "lora_A", "B": "lora_B"}
        peer = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(f"bert.{site}" for site in sites))
        peer.base_model_name_or_path = str(base)
        peer.save_pretrained(str(path))
        save_file(
            {
                f"base_model.model.bert.{site}.{names[name]}.weight": value
                for site, both in tensors.items()
                for name, value in both.items()
            },
            path / "adapter_model.safetensors",
            {"format": "pt"},
        )


def make_checkpoints(folder: Path, base: Path, count: int) -> None:
    """Fine-tuned models: the base and noise, in every tensor."""
    import torch

    import mergekit_bert as mb
    from mergekit_bert.encoder.folder import folder_in_parts
    from mergekit_bert.encoder.load import Base
    from mergekit_bert.encoder.stored import open_encoder

    encoder = open_encoder(base)
    head = {"classifier.weight": torch.zeros(5, encoder.config.hidden_size), "classifier.bias": torch.zeros(5)}
    for number in range(count):
        source = torch.Generator().manual_seed(number)
        task = dataclasses.replace(mb.get_task("sst"), name=f"t{number}", hub=None)
        record = {"kind": "full", "base": dataclasses.asdict(Base.of(encoder)), "max_length": 512}
        record["training"] = {"examples": 100}
        with folder_in_parts(folder / f"t{number}", head, encoder, task, record) as put:
            for name, weight in encoder.weights.items():
                put(name, weight + 0.01 * torch.randn(weight.shape, generator=source))


# --- one run, in a process of its own ---------------------------------------------------------------------------------


class Clock:
    """Seconds of each stage, and the most memory that the process ever had."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.before, self.last = _peak(), time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now

    def told(self) -> dict[str, Any]:
        whole = sum(self.seconds.values())
        return {"seconds": whole, "stages": self.seconds, "peak_bytes": _peak(), "imported_bytes": self.before}


def _peak() -> int:
    """The most memory of this program; ``ru_maxrss`` would count what started it too."""
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", told)[1]) * 1024  # type: ignore[index]


def options_of(method: str) -> dict[str, Any]:
    return {"density": DENSITY} if method == "ties" else {}


def run_mbert(inputs: Sequence[Path], out: Path, method: str, space: str, rank: int | None) -> Clock:
    from mergekit_bert.composing.merging import merge
    from mergekit_bert.composing.recipe import Recipe
    from mergekit_bert.formats.file import write_model
    from mergekit_bert.formats.inputs import read_inputs

    clock = Clock()
    found = [one for path in inputs for one in read_inputs(path)]
    clock.done("read")
    model = merge(found, Recipe(method, space, options_of(method), rank=rank))
    clock.done("merge")
    write_model(out, model)
    clock.done("write")
    return clock


def run_mbert_dense(inputs: Sequence[Path], out: Path, method: str) -> Clock:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification  # noqa: F401

    from mergekit_bert.composing.merging import merge
    from mergekit_bert.composing.recipe import Recipe
    from mergekit_bert.formats.dense import write_dense
    from mergekit_bert.formats.inputs import read_inputs

    clock = Clock()
    found = [one for path in inputs for one in read_inputs(path)]
    clock.done("open")
    model = merge(found, Recipe(method, options=options_of(method)), lazy=True)
    write_dense(out, model, found[0].encoder, only=[found[0].name])  # type: ignore[arg-type]
    clock.done("merge and write")
    return clock


def run_peft(inputs: Sequence[Path], out: Path, kind: str) -> Clock:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForSequenceClassification

    clock = Clock()
    base = LoraConfig.from_pretrained(str(inputs[0])).base_model_name_or_path
    shell = AutoModelForSequenceClassification.from_pretrained(base)
    model = PeftModel.from_pretrained(shell, str(inputs[0]), adapter_name=inputs[0].name)
    for path in inputs[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    clock.done("read")
    names = [path.name for path in inputs]
    svd = {"svd_rank": RANK} if kind != "linear" else {}
    dense = {"density": DENSITY} if kind.startswith("ties") else {}
    weight = 1.0 if kind.startswith("ties") else 1 / len(names)
    model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **svd, **dense)
    clock.done("merge")
    model.save_pretrained(str(out), selected_adapters=["merged"])
    clock.done("write")
    return clock


MERGEKIT_RUN = """
import json, re, sys, time, logging
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
logging.disable(logging.WARNING)
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
config, out = MergeConfiguration.model_validate(json.loads(sys.argv[1])), sys.argv[2]
start = time.perf_counter()
run_merge(config, out, MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True))
whole = time.perf_counter() - start
print(json.dumps({"seconds": whole, "stages": {"all": whole}, "peak_bytes": peak(), "imported_bytes": before}))
"""


def run_mergekit(python: Path, inputs: Sequence[Path], out: Path, method: str, base: Path) -> dict[str, Any]:
    given = options_of(method)
    config: dict[str, Any] = {
        "merge_method": MERGEKIT[method],
        "models": [{"model": str(path), "parameters": {"weight": 1.0, **given}} for path in inputs],
        "parameters": {"normalize": True},
        "dtype": "float32",
    }
    if method == "ties":
        config["base_model"] = str(base)
    return _child([str(python), "-c", MERGEKIT_RUN, json.dumps(config), str(out)])


def run_floor(inputs: Sequence[Path], out: Path, like: Path) -> Clock:
    """Read every input and write as many bytes as ``like`` has, as durably as mbert does; nothing else."""
    from mergekit_bert.files import write_atomic

    clock = Clock()
    size, room = like.stat().st_size, bytearray(1 << 24)
    for path in inputs:
        with path.open("rb") as file:
            while file.readinto(room):
                pass
    clock.done("read")
    if size < 1 << 30 and out.suffix == ".safetensors":
        write_atomic(out, bytes(size))
    else:
        with out.open("wb") as file:
            for start in range(0, size, len(room)):
                file.write(room[: size - start])
    clock.done("write")
    return clock


def _child(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(command)[:300]}: {ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def child(job: dict[str, Any]) -> dict[str, Any]:
    """``job`` in a process of its own."""
    return _child([sys.executable, "-m", "benchmarks.merge", "--job", json.dumps(job)])


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a child does."""
    inputs, out, kind = [Path(one) for one in job["inputs"]], Path(job["out"]), job["kind"]
    if kind == "mbert":
        return run_mbert(inputs, out, job["method"], job.get("space", "full"), job.get("rank")).told()
    if kind == "mbert dense":
        return run_mbert_dense(inputs, out, job["method"]).told()
    if kind == "peft":
        return run_peft(inputs, out, job["method"]).told()
    return run_floor(inputs, out, Path(job["like"])).told()


# --- equal results ----------------------------------------------------------------------------------------------------


def apart_from_peft(inputs: Sequence[Path], ours: Path, theirs: Path, method: str) -> dict[str, float]:
    """Over three sites, by Frobenius norm: the largest difference of both results, and how far each is from the sum
    (or the election) before it was cut to the rank."""
    import torch
    from safetensors.torch import load_file

    from mergekit_bert.adapters.adapter import Adapter
    from mergekit_bert.composing.merging import merge
    from mergekit_bert.composing.recipe import Recipe
    from mergekit_bert.formats.file import read_model
    from mergekit_bert.formats.inputs import read_inputs
    from mergekit_bert.models.composition import Merged

    model = read_model(ours)
    exact = merge(
        [one for path in inputs for one in read_inputs(path)], Recipe(method, options=options_of(method)), lazy=True
    )
    assert isinstance(model, Merged)
    assert isinstance(exact, Merged)
    assert not isinstance(model, Adapter)
    tensors = load_file(theirs / "merged" / "adapter_model.safetensors")
    config = json.loads((theirs / "merged" / "adapter_config.json").read_text())
    told = {"apart": 0.0, "mbert_error": 0.0, "peft_error": 0.0}
    for site in sorted(model.deltas)[:3]:
        B, A = (tensors[f"base_model.model.bert.{site}.lora_{name}.weight"] for name in "BA")
        peer = config["lora_alpha"] / config["r"] * (B @ A)
        mine, whole = model.deltas[site].dense(), exact.deltas[site].dense()
        norm = torch.linalg.matrix_norm
        for key, gap, size in (
            ("apart", mine - peer, peer),
            ("mbert_error", mine - whole, whole),
            ("peft_error", peer - whole, whole),
        ):
            told[key] = max(told[key], float(norm(gap) / norm(size)))
    return told


def apart_from_mergekit(ours: Path, theirs: Path) -> dict[str, float]:
    """Of the first layer's matrices: the share of entries that differ, and the largest difference.

    Biases and norms are left out: mbert adds their changes, mergekit gives them to the method too.
    """
    from mergekit_bert.tensorfile import StoredTensors

    one, two = StoredTensors(ours), StoredTensors(theirs)
    names = [name for name, shape in one.shapes.items() if "encoder.layer.0." in name and len(shape) == 2]
    gaps = [(one[name] - two[name]).abs() for name in names]
    differ = sum(int((gap > 1e-6).sum()) for gap in gaps) / sum(gap.numel() for gap in gaps)
    return {"share_of_entries": differ, "largest": max(float(gap.max()) for gap in gaps)}


# --- the measurements -------------------------------------------------------------------------------------------------

Run = Callable[[int], dict[str, Any]]


def repeated(runs: dict[str, Run], repeats: int) -> dict[str, dict[str, Any]]:
    """Each side ``repeats`` times, in turns: medians, and the spread of the seconds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(repeats):
        for name in runs if number % 2 else reversed(runs):  # neither side is always first
            found[name].append(runs[name](number))
            print(f"{name}: {found[name][-1]['seconds']:.2f} s ({number + 1} of {repeats})", flush=True)
    return {
        name: {
            "seconds": median(one["seconds"] for one in told),
            "spread": [min(one["seconds"] for one in told), max(one["seconds"] for one in told)],
            "stages": {stage: median(one["stages"][stage] for one in told) for stage in told[0]["stages"]},
            "peak_bytes": median(one["peak_bytes"] for one in told),
            "imported_bytes": median(one["imported_bytes"] for one in told),
        }
        for name, told in found.items()
    }


def present(methods: Sequence[str]) -> list[str]:
    from mergekit_bert.composing.method import METHODS

    return [name for name in methods if name in METHODS.names()]


def files(folder: Path, count: int, ending: str = "") -> list[str]:
    return [str(folder / f"t{number}{ending}") for number in range(count)]


def adapters(work: Path, base: Path, count: int, repeats: int) -> dict[str, Any]:
    """``count`` adapters of all linear layers to one of the same rank."""
    ours, theirs = files(work / "mbert", count, ".safetensors"), files(work / "peft", count)
    runs: dict[str, Run] = {}

    def job(name: str, out: str, **given: Any) -> None:
        runs[name] = lambda number: child({**given, "out": str(work / f"{number}.{out}")})

    for method, kind in PEFT.items():
        out = f"{method}.safetensors"
        job(f"mbert {method}", out, kind="mbert", inputs=ours, method=method, rank=RANK)
        job(f"peft {kind}", kind, kind="peft", inputs=theirs, method=kind)
    job("peft linear", "linear", kind="peft", inputs=theirs, method="linear")
    child({"kind": "mbert", "inputs": ours, "method": "fedavg", "rank": RANK, "out": str(work / "like.safetensors")})
    like = str(work / "like.safetensors")
    job("read and write once", "floor.safetensors", kind="floor", inputs=ours, like=like)
    told = repeated(runs, repeats)
    results = {
        method: apart_from_peft(
            [Path(one) for one in ours], work / f"0.{method}.safetensors", work / f"0.{kind}", method
        )
        for method, kind in PEFT.items()
    }
    return {"what": f"{count} adapters", "runs": told, "floor": "read and write once", "results": results}


def dense(work: Path, base: Path, count: int, repeats: int, mergekit: Path | None) -> dict[str, Any]:
    """``count`` whole checkpoints to one folder."""
    inputs = files(work, count)
    runs: dict[str, Run] = {}

    def ours(method: str) -> Run:
        out = work / f"mbert_{method}"
        return lambda number: child(
            {"kind": "mbert dense", "inputs": inputs, "method": method, "out": str(out / f"{number}")}
        )

    def theirs(python: Path, method: str) -> Run:
        out = work / f"mergekit_{method}"
        return lambda number: run_mergekit(python, [Path(one) for one in inputs], out, method, base)

    for method, kind in MERGEKIT.items():
        runs[f"mbert {method}"] = ours(method)
        if mergekit is not None:
            runs[f"mergekit {kind}"] = theirs(mergekit, method)
    weights = [f"{one}/model.safetensors" for one in inputs]
    floor = {"kind": "floor", "inputs": weights, "like": weights[0], "out": str(work / "floor.bin")}
    runs["read and write once"] = lambda number: child(floor)
    told = repeated(runs, repeats)
    apart = {
        method: apart_from_mergekit(work / f"mbert_{method}" / "0" / "t0", work / f"mergekit_{method}")
        for method in (MERGEKIT if mergekit is not None else ())
    }
    return {"what": f"{count} checkpoints", "runs": told, "floor": "read and write once", "results": apart}


def memory(work: Path, counts: Sequence[int]) -> dict[str, dict[str, int]]:
    """Peak memory of a dense merge, beyond the imports, against the number of checkpoints."""
    told: dict[str, dict[str, int]] = {}
    for method in MERGEKIT:
        for count in counts:
            out = str(work / f"memory_{method}_{count}")
            found = child({"kind": "mbert dense", "inputs": files(work, count), "method": method, "out": out})
            told.setdefault(method, {})[str(count)] = found["peak_bytes"] - found["imported_bytes"]
    return told


def growth(work: Path, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds of merging the six sites of one layer, against the number of adapters."""
    told: dict[str, dict[str, float]] = {}
    for method in present(["fedavg", "ties", "tsv", "iso_c"]):
        for count in counts:
            inputs = [Path(one) for one in files(work / "mbert", count, ".safetensors")]
            clock = run_mbert(inputs, work / "grown.safetensors", method, "full", RANK)
            told.setdefault(method, {})[str(count)] = clock.seconds["merge"]
            print(f"{method}, {count} adapters, one layer: {clock.seconds['merge']:.2f} s", flush=True)
    return told


def spaces(work: Path, count: int) -> dict[str, dict[str, float]]:
    """Seconds of merging one layer in every space."""
    told: dict[str, dict[str, float]] = {}
    for method in present(SPACES):
        for space in ("full", "core", "knots"):
            inputs = [Path(one) for one in files(work / "mbert", count, ".safetensors")]
            clock = run_mbert(inputs, work / "space.safetensors", method, space, None)
            told.setdefault(method, {})[space] = clock.seconds["merge"]
            print(f"{method} of {count} adapters in {space}, one layer: {told[method][space]:.3f} s", flush=True)
    return told


def draw(grown: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for method, seconds in grown.items():
        axes.plot([int(count) for count in seconds], list(seconds.values()), marker="o", label=method)
    counts = [int(count) for count in next(iter(grown.values()))]
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.set(yscale="log", xlabel=f"adapters of rank {RANK}", ylabel="seconds for one layer of BERT")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(console: Console, size: str, told: dict[str, Any]) -> None:
    floor = told["runs"][told["floor"]]["seconds"]
    table = Table(
        "side", "seconds", "spread", "× reading and writing", "MiB beyond imports", title=f"{size}, {told['what']}"
    )
    for name, one in told["runs"].items():
        beyond = (one["peak_bytes"] - one["imported_bytes"]) / 2**20
        spread = f"{one['spread'][0]:.2f} to {one['spread'][1]:.2f}"
        table.add_row(name, f"{one['seconds']:.2f}", spread, f"{one['seconds'] / floor:.1f}", f"{beyond:.0f}")
    console.print(table)
    console.print("results apart:", told["results"])


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One repeat, few inputs: under two minutes.")] = False,
    large: Annotated[bool, typer.Option("--large", help="Also at the shapes of bert-large.")] = False,
    mergekit: Annotated[Path | None, typer.Option(help="Python of an environment that has mergekit.")] = None,
    repeats: Annotated[int, typer.Option()] = 5,
) -> None:
    import torch

    repeats, console = 1 if quick else repeats, Console(width=120)
    if mergekit is None:
        console.print("no --mergekit PYTHON: its side is left out")
    told: dict[str, Any] = {**provenance(), "threads": torch.get_num_threads(), "rank": RANK, "density": DENSITY}
    with tempfile.TemporaryDirectory() as name:
        for size in ("quick",) if quick else ("base", "large") if large else ("base",):
            root = Path(name) / size
            base = make_base(root / "base", size)
            counts, layer, whole = ((3,), 8, 4) if quick else ((3, 30), 64, 8)
            make_adapters(root / "adapters", base, max(counts), r"encoder\..*")
            make_adapters(root / "layer", base, layer, LAYER)
            make_checkpoints(root / "checkpoints", base, whole)
            found: dict[str, Any] = {"adapters": [adapters(root / "adapters", base, n, repeats) for n in counts]}
            found["dense"] = dense(root / "checkpoints", base, 3, repeats, mergekit)
            for one in (*found["adapters"], found["dense"]):
                show(console, size, one)
            found["memory_bytes"] = memory(root / "checkpoints", [n for n in (2, 4, 8) if n <= whole])
            found["growth_seconds"] = growth(root / "layer", [n for n in (2, 4, 8, 16, 32, 64) if n <= layer])
            found["space_seconds"] = spaces(root / "layer", 8)
            told[size] = found
    write_result("merge_quick" if quick else "merge", told)
    if not quick:
        draw(told["base"]["growth_seconds"], Path(__file__).parent / "results" / "merge_growth.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        typer.run(main)
