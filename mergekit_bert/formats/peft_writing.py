"""Writing PEFT adapter folders, as :mod:`mergekit_bert.formats.peft_reading` reads them and PEFT loads them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.family import Peft
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.folder import RECORD, scale_head
from mergekit_bert.encoder.head import head_of
from mergekit_bert.encoder.heads.native import native_prefix
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.places import MINILM
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import atomic_folder, write_json
from mergekit_bert.formats.peft import CONFIG, FORMAT, PREFIX, WEIGHTS, identity
from mergekit_bert.tensorfile import write_plain_tensors

FILES = (RECORD, CONFIG, WEIGHTS)
"""The names in such a folder."""
_HUB = {MINILM: "sentence-transformers/all-MiniLM-L6-v2"}
"""What others know a base by."""


def write_adapter_folder(path: Path, adapter: Adapter, encoder: Encoder) -> None:
    """Write ``adapter`` as a PEFT folder, atomically; raises CompositionError where PEFT has no place for it.

    A LoRA's biases become ``bias="all"`` (or ``"lora_only"``), LayerNorms modules saved whole.
    """
    peft, kind = adapter.family.peft, head_of(adapter.head)
    if not kind.is_native:
        raise CompositionError(
            f"adapter {adapter.name!r}", f"the head {kind.name}", "transformers' own, the only one that PEFT has",
            "convert it to a Hugging Face folder (`to=hf`)",
        )  # fmt: skip
    if adapter.extras:
        raise CompositionError(
            f"adapter {adapter.name!r}", f"a {' and a '.join(adapter.extras)}",
            "Deltas and shifts alone: mbert does not write PEFT's prompt learning", "keep it as a file of mbert",
        )  # fmt: skip
    if reason := _no_place(adapter):
        raise CompositionError(
            f"adapter {adapter.name!r}", reason, "what PEFT has a place for",
            "convert it to a Hugging Face folder (`to=hf`)",
        )  # fmt: skip
    assert peft is not None
    model = classifier(encoder, adapter.task, adapter.head)
    scale_head(model, adapter.task)
    shell = native_prefix(encoder.config, adapter.task)
    head = {name: parameter.detach().cpu().clone() for name, parameter in model.head().items()}
    parameters = dict(encoder.model.named_parameters())
    whole = sorted({name.rpartition(".")[0] for name in adapter.shifts if not name.endswith(".bias")})
    shifted = {name: parameters[name].detach().cpu() + shift for name, shift in adapter.shifts.items()}
    shifted |= {
        name: shifted.get(name, parameter.detach().cpu().clone())
        for name, parameter in parameters.items()
        if name.rpartition(".")[0] in whole
    }
    biases = [name.removesuffix(".bias") for name in shifted if name.rpartition(".")[0] not in whole]
    tensors = {f"{PREFIX}{name}": value for name, value in head.items()}
    for site, found in adapter.tensors.items():
        tensors |= {f"{PREFIX}{shell}{site}.{ending}": found[name] for name, ending in peft.tensors.items()}
    for name, value in shifted.items():
        module, _, tensor = name.rpartition(".")
        inner = f"{module}.base_layer" if module in adapter.sites else module
        inner = inner if adapter.sites else f"{inner}.ln_tuning_layers"
        tensors[f"{PREFIX}{shell}{inner}.{tensor}"] = value
    saved = sorted({name.partition(".")[0] for name in head})
    targets = [f"{shell}{module}" for module in (adapter.sites or whole)]
    saved += [f"{shell}{module}" for module in whole if adapter.sites]
    with atomic_folder(path) as part:
        write_plain_tensors(part / WEIGHTS, tensors)
        written = _common(adapter, peft, targets, saved) | _options(adapter, peft, shell, biases)
        write_json(part / CONFIG, written | dict.fromkeys(peft.switches, True))
        write_json(
            part / RECORD,
            {
                "format": FORMAT,
                "kind": "peft",
                "task": adapter.task.to_json(),
                "max_length": adapter.max_length,
                "base": dataclasses.asdict(adapter.base),
                "sha256": identity(part),
                "adapter": {
                    "type": adapter.type,
                    "config": adapter.config.to_json(),
                    "basis": adapter.basis.to_json() if adapter.basis else None,
                    "training": dict(adapter.training),
                    "scores": dict(adapter.scores),
                },
            },
        )


def _no_place(adapter: Adapter) -> str:
    """What PEFT has no place for, empty where it has one for everything."""
    peft, config = adapter.family.peft, adapter.config
    if peft is None:
        return f"type {adapter.type}, which PEFT does not have"
    if not adapter.sites and (adapter.family.sites or not adapter.shifts):
        return f"type {adapter.type} without a layer that it changes"
    biases = [name.removesuffix(".bias") for name in adapter.shifts if name.endswith(".bias")]
    if not peft.biases and any(f"{module}.weight" not in adapter.shifts for module in biases):
        return f"biases beside {adapter.type}, which PEFT has for LoRA alone"
    usual = type(config)()
    lacking = [name for name in peft.lacks if getattr(config, name) != getattr(usual, name)]
    return f"a {adapter.type} with {', '.join(lacking)}" if lacking else ""


def _common(adapter: Adapter, peft: Peft, targets: Sequence[str], saved: Sequence[str]) -> dict[str, Any]:
    """What PEFT needs to know of an adapter of any kind; the rest are its defaults."""
    return {
        "peft_type": peft.type,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": _HUB.get(adapter.base.name, adapter.base.name),
        "inference_mode": True,
        "target_modules": sorted(targets),
        "modules_to_save": list(saved),
    }


def _options(adapter: Adapter, peft: Peft, shell: str, biases: Sequence[str]) -> dict[str, Any]:
    """The options as PEFT's settings, and which biases are trained."""
    config = adapter.config.renamed({site: f"{shell}{site}" for site in adapter.sites})
    values: dict[str, Any] = {setting: getattr(config, option) for option, setting in peft.options.items()}
    beside = all(module in adapter.sites for module in biases)
    return values | ({"bias": "none" if not biases else "lora_only" if beside else "all"} if peft.biases else {})
