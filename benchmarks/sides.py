"""The two sides of the speed benchmarks: mbert, and what people write today (PEFT with transformers' Trainer)."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.places import minilm_folder
from mergekit_bert.encoder.pretrained import quiet_transformers
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import finetune, train_adapter

LENGTH = 256


@dataclass(frozen=True)
class Trained:
    """What one training gave: seconds from rows to a trained model, peak memory till then, the held-out score."""

    seconds: float
    memory_bytes: int
    score: float


def peak_bytes() -> int:
    """This process's peak resident memory (the count of ``getrusage`` begins with the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def train_mbert(task: mb.Task, rows: Rows, held: Rows, options: dict[str, Any], kind: str) -> Trained:
    """``kind``: adapter (ordinary LoRA), orthogonal (mbert's default basis) or full."""
    encoder = mb.load_encoder("minilm")
    config = mb.TrainConfig(epochs=1, batch_size=32, hold_out=0.01, hold_out_limit=1, max_length=LENGTH, **options)
    with tempfile.TemporaryDirectory() as folder:
        out, control = Path(folder) / ("x" if kind == "full" else "x.safetensors"), Control(show=False)
        start = time.perf_counter()
        if kind == "full":
            model: Any = finetune(encoder, task, rows, out, config, control)
        else:
            basis = "random" if kind == "adapter" else "orthogonal"
            model = train_adapter(encoder, task, rows, out, "lora", mb.AdapterConfig(basis=basis), config, control)
        seconds, memory = time.perf_counter() - start, peak_bytes()
        outputs = mb.predictor(model, base=encoder).outputs(task.name, held)
    return Trained(seconds, memory, score(task, held, outputs))


def train_peer(task: mb.Task, rows: Rows, held: Rows, options: dict[str, Any], kind: str) -> Trained:
    """``kind``: adapter or full, and whatever else follows a plus: ``bf16``, ``grouped``."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    what, *extras = kind.split("+")
    tokenizer, model = AutoTokenizer.from_pretrained(str(minilm_folder())), peer_model(task)
    if what == "adapter":
        model = with_lora(model)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=32,
            learning_rate=options["lr"],
            seed=options["seed"],
            weight_decay=0.01,
            warmup_steps=0.1,
            use_cpu=True,
            bf16="bf16" in extras,
            train_sampling_strategy="group_by_length" if "grouped" in extras else "random",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encoded(tokenizer, task, rows),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        seconds, memory = time.perf_counter() - start, peak_bytes()
        outputs = trainer.predict(encoded(tokenizer, task, held)).predictions
    return Trained(seconds, memory, score(task, held, np.asarray(outputs, dtype=np.float64)))


def peer_model(task: mb.Task) -> nn.Module:
    """What ``AutoModelForSequenceClassification.from_pretrained`` gives for the embedded encoder."""
    kind = "single_label_classification" if task.range is None else "regression"
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers():
        torch.manual_seed(0)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            str(minilm_folder()), num_labels=task.outputs, problem_type=kind, dtype=torch.float32
        )
    return model


def with_lora(model: nn.Module) -> Any:
    """PEFT's adapter of the same size and sites as mbert's default."""
    from peft import LoraConfig, get_peft_model

    size = mb.AdapterConfig()
    return get_peft_model(
        model,  # type: ignore[arg-type]
        LoraConfig(task_type="SEQ_CLS", r=size.rank, lora_alpha=int(size.alpha), target_modules="all-linear"),
    )


def encoded(tokenizer: Any, task: mb.Task, rows: Rows) -> list[dict[str, Any]]:
    """Rows as the Trainer takes them; a regression's labels on 0…1, as mbert trains them."""
    texts = [list(column) for column in zip(*rows.texts, strict=True)]
    columns = tokenizer(*texts, truncation=True, max_length=LENGTH)
    labels: Sequence[float] = rows.labels or [0] * len(rows)
    if task.range is not None:
        low, high = task.range
        labels = [(value - low) / (high - low) for value in labels]
    kind = int if task.range is None else float
    return [
        {**{name: column[row] for name, column in columns.items()}, "labels": kind(labels[row])}
        for row in range(len(rows))
    ]


def score(task: mb.Task, rows: Rows, outputs: np.ndarray) -> float:
    """The task's main metric."""
    return metric(task.metric).value(rows.label_column(task), kind_of(task).predicted(task, outputs))


def peft_of(adapter: Adapter) -> Any:
    """The adapter as a PEFT model with a head, giving the same outputs (a regression on 0…1)."""
    model = with_lora(peer_model(adapter.task))
    load_into_peft(model, adapter, "default")
    head = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if "classifier" in name}
    with torch.no_grad():
        for name, parameter in head.items():
            parameter.copy_(adapter.head[name.replace("modules_to_save.default.", "").replace("original_module.", "")])
    return model.eval()


def operations(encoder: Encoder, lengths: Sequence[int], each: int, last_whole: bool) -> int:
    """Floating-point operations of rows through the layers' weights, ``each`` a weight and real token.

    Unless ``last_whole``, what follows the last layer's attention is done for one token of each row, as mbert does.
    """
    sizes = {name: m.weight.numel() for name, m in encoder.model.encoder.named_modules() if isinstance(m, nn.Linear)}
    last = f".{encoder.config.num_hidden_layers - 1}."
    once = 0 if last_whole else sum(size for name, size in sizes.items() if last in name and ".self." not in name)
    return each * ((sum(sizes.values()) - once) * sum(lengths) + once * len(lengths))


def check_same(task: mb.Task, rows: Rows) -> float:
    """The largest difference of both sides' outputs with the same adapter and head; SystemExit beyond rounding."""
    encoder = mb.load_encoder("minilm")
    trained = shipped_one(task.name)
    source = torch.Generator().manual_seed(0)
    tensors = {
        site: {name: torch.randn(value.shape, generator=source) * 0.05 for name, value in one.items()}
        for site, one in trained.tensors.items()
    }
    adapter = dataclasses.replace(trained, tensors=tensors, basis=None)
    ours = mb.predictor(adapter, base=encoder).outputs(task.name, rows)
    padded = encoder.tokenizer(
        *[list(column) for column in zip(*rows.texts, strict=True)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = peft_of(adapter)(**padded).logits.numpy()
    if task.range is not None:
        theirs = task.range[0] + (task.range[1] - task.range[0]) * theirs
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not apart < 1e-4:
        raise SystemExit(f"the two sides do not compute the same: {apart:.2g} apart")
    return apart


def load_into_peft(model: Any, adapter: Adapter, name: str) -> None:
    """Put the adapter's factors where PEFT keeps those of the adapter called ``name``."""
    with torch.no_grad():
        for place, module in model.named_modules():
            for site, tensors in adapter.tensors.items():
                if place.endswith(f".{site}") and hasattr(module, "lora_A"):
                    module.lora_A[name].weight.copy_(tensors["A"])
                    module.lora_B[name].weight.copy_(tensors["B"])


def shipped_one(task: str) -> Adapter:
    """The adapter of a task that comes with the project."""
    return read_adapter(Path(__file__).parent.parent / "adapters" / f"{task}.safetensors")
