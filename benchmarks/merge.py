"""Merging speed and memory beside PEFT and mergekit: same tensors, same rank, equal results, every run its own process.

Usage: python -m benchmarks.merge [--quick] [--large] [--mergekit PYTHON]

Models and adapters are random, of BERT's shapes: the time of a merge does not depend on what they learned. Seconds are
counted after the imports; peak memory is the operating system's. ``PYTHON`` is the interpreter of an environment with
mergekit, whose pins differ from the project's: ``python -m venv E; E/bin/pip install torch mergekit``.
"""

import dataclasses
import json
import os
import resource
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

RANK, DENSITY = 16, 0.2
SHAPES = {"base": (12, 768, 3072), "large": (24, 1024, 4096)}
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
    """Random LoRA adapters, as files of mbert's (``mbert/``) and as folders of PEFT's (``peft/``) of the same tensors."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    import mergekit_bert as mb
    from mergekit_bert.adapters.adapter import Adapter, Base
    from mergekit_bert.adapters.file import write_adapter
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
            Adapter(
                "lora", config, task, Base.of(encoder), 512, sites, tensors, {}, head, None, {"examples": 100}, {}
            ),
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
    from mergekit_bert.adapters.adapter import Base
    from mergekit_bert.encoder.folder import folder_in_parts
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_mbert(inputs: Sequence[Path], out: Path, method: str, space: str, rank: int | None) -> Clock:
    from mergekit_bert.composing.file import write_model
    from mergekit_bert.composing.inputs import read_inputs
    from mergekit_bert.composing.merging import merge
    from mergekit_bert.composing.recipe import Recipe

    clock = Clock()
    found = [one for path in inputs for one in read_inputs(path)]
    clock.done("read")
    model = merge(found, Recipe(method, space, rank=rank))
    clock.done("merge")
    write_model(out, model)
    clock.done("write")
    return clock


def run_mbert_dense(inputs: Sequence[Path], out: Path, method: str) -> Clock:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification  # noqa: F401

    from mergekit_bert.composing.dense import write_dense
    from mergekit_bert.composing.inputs import read_inputs
    from mergekit_bert.composing.merging import ingredient, merge
    from mergekit_bert.composing.recipe import Recipe

    clock = Clock()
    found = [ingredient(one) for path in inputs for one in read_inputs(path)]
    clock.done("open")
    model = merge(found, Recipe(method), lazy=True)
    write_dense(out, model, found[0].model.encoder, only=[found[0].name])  # type: ignore[arg-type]
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
import json, resource, sys, time, logging
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
logging.disable(logging.WARNING)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
config, out = MergeConfiguration.model_validate(json.loads(sys.argv[1])), sys.argv[2]
start = time.perf_counter()
run_merge(config, out, MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True))
whole = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": whole, "stages": {"all": whole}, "peak_bytes": peak, "imported_bytes": before}))
"""


def run_mergekit(python: Path, inputs: Sequence[Path], out: Path, method: str, base: Path) -> dict[str, Any]:
    given = {"density": DENSITY} if method == "ties" else {}
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
