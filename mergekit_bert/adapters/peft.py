"""Reading PEFT adapter folders: LoRA, rsLoRA and DoRA with patterns, biases and whole modules, and a head.

Such a folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Its tensors are named
``base_model.model.<module>.lora_A.weight`` (``(r, in)``), ``….lora_B.weight`` (``(out, r)``) and, for DoRA (arXiv
2402.09353), ``….lora_magnitude_vector`` (``(out,)``); biases and the modules saved whole (the head among them) are
there as values, not as changes. A folder that mbert wrote has ``mbert.json`` besides, for what PEFT has no place for.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.adapter import TYPES, Adapter, Base, Size
from mergekit_bert.adapters.attach import shift_names
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import AdapterConfig, matching
from mergekit_bert.adapters.delta import Delta, Dense
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import RECORD, unscale_head
from mergekit_bert.encoder.heads import classifier, head_shapes
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import TARGETS, find_sites, linear_layers
from mergekit_bert.errors import CompositionError, EncoderError, MbertError, ModelFileError
from mergekit_bert.files import file_fingerprint, fingerprint
from mergekit_bert.tensorfile import read_plain_tensors

T = TypeVar("T")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "m"}
_KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("fan_in_fan_out", "init_lora_weights", "eva_config", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}
"""Settings that are heeded, or that change nothing in a trained adapter of linear layers."""
_COPIES = (r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\.")
"""What copies have in their names, which ``bias="all"`` saves of the biases of modules that are saved whole."""
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""
_AGAIN = "save it with PEFT again"


@dataclass(frozen=True)
class PeftFolder:
    """A folder as read, before its base is known.

    ``task``, ``max_length`` and ``base`` come from ``mbert.json``, None where there is none; ``told`` is the rest of
    it (the options, basis rows and provenance of the adapter), where the folder is still as it was written.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    task: Task | None
    max_length: int | None
    base: Base | None
    told: Mapping[str, Any] | None

    @property
    def base_name(self) -> str | None:
        """The name of its base, as far as the folder knows."""
        return self.base.name if self.base else self.config.get("base_model_name_or_path")


def is_peft(path: Path) -> bool:
    """Whether ``path`` is a PEFT adapter folder."""
    return (path / CONFIG).is_file()


def open_peft(path: Path) -> PeftFolder:
    """Read the folder's files; raises ModelFileError for what mbert cannot use, whatever the base is."""
    config = _json(path / CONFIG)
    _check_config(str(path / CONFIG), config)
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise ModelFileError(str(path), "weights in a pickle, adapter_model.bin", WEIGHTS, _AGAIN)
    tensors = read_plain_tensors(path / WEIGHTS)
    where = str(path / RECORD)
    if not Path(where).exists():
        return PeftFolder(path, config, tensors, None, None, None, None)
    record = _json(path / RECORD)
    try:
        if record["format"] != FORMAT:
            raise ValueError(f"format version {record['format']!r}")
        told = record["adapter"] if record["sha256"] == identity(path) else None
        task = Task.from_json(record["task"])
        base = Base(**{key: str(value) for key, value in record["base"].items()})
        return PeftFolder(path, config, tensors, task, int(record["max_length"]), base, told)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MbertError) as error:
        found = " ".join(str(error).split())
        raise ModelFileError(where, f"broken ({found})", "a record as mbert writes it", "remove it") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = str(getattr(error, "strerror", "")).lower() or f"broken ({' '.join(str(error).split())})"
        raise ModelFileError(str(path), found, "a JSON file", _AGAIN) from error
    if not isinstance(value, dict):
        raise ModelFileError(str(path), f"a {type(value).__name__}", "names and values", _AGAIN)
    return value


def identity(path: Path) -> str:
    """SHA-256 (hex) of the two files that PEFT writes."""
    return fingerprint([file_fingerprint(path / name) for name in (CONFIG, WEIGHTS)])


def _check_config(where: str, config: Mapping[str, Any]) -> None:
    def check(good: bool, key: str, expected: str, remedy: str) -> None:
        if not good:
            raise ModelFileError(where, f"{key} is {config.get(key)!r}", expected, remedy)

    kind = config.get("peft_type")
    check(kind == "LORA", "peft_type", "LORA: no other kind is a change of weights that mbert knows", "give a LoRA")
    for key, value in config.items():
        check(key in _KNOWN or not value, key, "LoRA, rsLoRA or DoRA without further settings", "merge it with PEFT")
    check(config.get("init_lora_weights", True) in _INITS, "init_lora_weights",
          "an initialisation that leaves the base's weights as they are",
          "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)")  # fmt: skip
    check(type(config.get("r")) is int, "r", "a whole number", _AGAIN)
    check(config.get("bias", "none") in ("none", "all", "lora_only"), "bias", "none, all or lora_only", _AGAIN)
    for key in ("rank_pattern", "alpha_pattern"):
        check(isinstance(config.get(key) or {}, dict), key, "patterns and numbers", _AGAIN)


def adapter_of(folder: PeftFolder, encoder: Encoder, task: Task) -> tuple[Adapter, dict[str, Delta]]:
    """The folder's adapter for ``task`` on ``encoder``, and the Deltas that are not low-rank, by site.

    These are DoRA's, and linear layers saved whole; the adapter is without them. Raises ModelFileError where tensors
    do not fit the encoder or are left over, CompositionError where the head does not fit the task.
    """
    where, shell = str(folder.path), _shell_prefix(encoder, task)
    factors, values = _sorted(folder)
    sites = _sites(where, factors, encoder, shell, head_shapes(encoder, task))
    changes, head = _changes(where, values, encoder, shell, task)
    layers = linear_layers(encoder)
    whole = {name for name in changes if name.removesuffix(".weight") in layers and name.endswith(".weight")}
    shifts = {name: change for name, change in changes.items() if name not in whole}
    config = _read_config(folder, encoder, sites, shell, shifts)
    tensors = {site: factors[f"{shell}{site}"] for site in sites}
    dora = bool(folder.config.get("use_dora"))
    for site, size in sites.items():
        _check_factors(where, site, tensors[site], config.at(site).rank, size, dora)
    dense: dict[str, Delta] = {
        name.removesuffix(".weight"): Dense(changes[name]) for name in sorted(whole) if bool(changes[name].any())
    }
    if dora:
        weights = dict(encoder.model.named_parameters())
        for site, found in tensors.items():
            low = TYPES.get("lora").delta(found, config.at(site))
            dense[site] = Dense(_dora(weights[f"{site}.weight"].detach().cpu(), low, found["m"]))
        sites, tensors = {}, {}
    adapter = Adapter(
        type="lora",
        config=config,
        task=task,
        base=Base.of(encoder),
        max_length=min(folder.max_length or encoder.max_length, encoder.max_length),
        sites=sites,
        tensors=tensors,
        shifts=shifts,
        head=_head(head, encoder, task),
        basis=None,
        training={"peft_version": str(folder.config.get("peft_version")), "use_dora": dora},
        scores={},
    )
    return (adapter if folder.told is None else _as_told(where, adapter, folder.told)), dense


def _dora(weight: Float[Tensor, "out in"], low: Delta, magnitude: Float[Tensor, "out"]) -> Float[Tensor, "out in"]:
    """``m · (W + sBA) / ‖W + sBA‖ − W`` (Liu et al. 2024, arXiv 2402.09353), the norm by output row as PEFT has it."""
    turned = weight.double() + low.to(torch.float64).dense()
    norm = torch.linalg.vector_norm(turned, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    delta: Tensor = magnitude.double()[:, None] * turned / norm - weight.double()
    return delta.float()


def _shell_prefix(encoder: Encoder, task: Task) -> str:
    """What stands before the encoder's names in a model with a head, e.g. ``bert.``."""
    return f"{classifier(encoder, task, torch.Generator()).shell.base_model_prefix}."


def _sorted(folder: PeftFolder) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA's tensors by module, and saved values by parameter, in float32; names as the model with a head has them."""
    factors: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in folder.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        plain = [folder.tensors.get(PREFIX + re.sub(part, ".", name), tensor) for part in _COPIES]
        copied = any(one is not tensor and torch.equal(one, tensor) for one in plain)
        if copied or ".original_module." in name:
            continue
        ending = next((one for one in _FACTORS if name.endswith(one)), None)
        if ending is None:
            values[name if key.startswith(PREFIX) else key] = tensor.float()
        else:
            factors.setdefault(name.removesuffix(ending), {})[_FACTORS[ending]] = tensor.float()
    if not factors:
        raise ModelFileError(str(folder.path), "no LoRA tensors", "lora_A and lora_B of some layers", _AGAIN)
    return factors, values


def _sites(
    where: str, modules: Mapping[str, Any], encoder: Encoder, shell: str, head: Mapping[str, Any]
) -> dict[str, Size]:
    """The sites that ``modules`` are, in the encoder's order."""
    layers = linear_layers(encoder)
    for module in modules:
        if f"{module}.weight" in head:
            raise ModelFileError(
                where,
                f"LoRA at {module!r} of the head",
                "LoRA in the encoder alone: the base has no weights of a head to add to",
                "train with the head's modules in modules_to_save",
            )
        if not module.startswith(shell) or module.removeprefix(shell) not in layers:
            raise ModelFileError(
                where, f"LoRA at {module!r}", f"linear layers of {encoder.name!r}", "name the --base it was trained on"
            )
    return {site: size for site, size in layers.items() if f"{shell}{site}" in modules}


def _check_factors(where: str, site: str, found: Mapping[str, Tensor], rank: int, size: Size, dora: bool) -> None:
    out_features, in_features = size
    expected: dict[str, tuple[int, ...]] = {"A": (rank, in_features), "B": (out_features, rank)}
    expected |= {"m": (out_features,)} if dora else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != expected:
        told = (
            "{" + ", ".join(f"{name} {shape}" for name, shape in sorted(one.items())) + "}"
            for one in (shapes, expected)
        )
        raise ModelFileError(
            where, f"tensors of {site!r} are {next(told)}", next(told), "name the --base, or " + _AGAIN
        )


def _changes(
    where: str, values: Mapping[str, Tensor], encoder: Encoder, shell: str, task: Task
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Changes of the encoder's parameters, and the head's tensors."""
    parameters = dict(encoder.model.named_parameters())
    shapes = head_shapes(encoder, task)
    changes, head = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in values.items():
        inner, shape = name.removeprefix(shell), tuple(value.shape)
        if name in shapes and shape != shapes[name] and shape[1:] == shapes[name][1:]:
            raise CompositionError(
                where,
                f"a head of {shape[0]} outputs",
                f"{task.outputs}, which task {task.name!r} has",
                "name the task that it was trained on (`mbert convert --task`)",
            )
        if name in shapes and shape == shapes[name]:
            head[name] = value
        elif name.startswith(shell) and inner in parameters and parameters[inner].shape == value.shape:
            changes[inner] = value - parameters[inner].detach().cpu().float()
        else:
            raise ModelFileError(
                where,
                f"tensor {name!r} of shape {shape}",
                f"tensors of {encoder.name!r} and its head",
                "name the --base it was trained on",
            )
    lacking = sorted(set(shapes) - set(head))
    if lacking:
        modules = ", ".join(sorted({name.partition(".")[0] for name in shapes}))
        raise CompositionError(
            where,
            f"no {lacking[0]!r}" if head else "no head",
            f"the whole head of {encoder.config.model_type} ({', '.join(shapes)})",
            f"train with modules_to_save=[{modules}]",
        )
    return changes, {name: head[name] for name in shapes}


def _head(head: Mapping[str, Tensor], encoder: Encoder, task: Task) -> dict[str, Tensor]:
    """The head as mbert keeps it: a regression's on 0…1."""
    model = classifier(encoder, task, head)
    unscale_head(model, task)
    return {name: parameter.detach().cpu() for name, parameter in model.head().items()}


def _read_config(
    folder: PeftFolder, encoder: Encoder, sites: Mapping[str, Size], shell: str, shifts: Mapping[str, Tensor]
) -> AdapterConfig:
    given, names = folder.config, {f"{shell}{site}": site for site in sites}
    biases = set(shift_names(encoder.model, bias=True, layernorm=False))
    try:
        alphas = {pattern: float(alpha) for pattern, alpha in (given.get("alpha_pattern") or {}).items()}
        ranks = given.get("rank_pattern") or {}
        config = AdapterConfig(
            rank=given["r"],
            alpha=float(given.get("lora_alpha", 8)),
            rank_stabilized=bool(given.get("use_rslora")),
            dropout=float(given.get("lora_dropout") or 0),
            targets=_targets(encoder, sites, given.get("target_modules")),
            basis="random",
            train_bias=not biases.isdisjoint(shifts),
            train_layernorm=not biases.issuperset(shifts),
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
        return dataclasses.replace(
            config,
            rank_pattern=carried(ranks, config.rank, names),
            alpha_pattern=carried(alphas, config.alpha, names),
        )
    except (TypeError, ValueError, OverflowError, MbertError) as error:
        found = " ".join(str(error).split())
        raise ModelFileError(str(folder.path / CONFIG), f"broken ({found})", "options of a LoRA", _AGAIN) from error


def carried(patterns: Mapping[str, T], default: T, names: Mapping[str, str]) -> dict[str, T]:
    """``patterns`` of names (the keys of ``names``) as patterns of their new names: whole names, where they must be.

    They are put in the order of JSON's keys, since the first one that matches counts.
    """
    exact = {new: matching(patterns, old, default) for old, new in names.items()}
    kept = dict(sorted(patterns.items()))
    if all(matching(kept, new, default) == value for new, value in exact.items()):
        return kept
    return {new: value for new, value in sorted(exact.items()) if value != default}


def _targets(encoder: Encoder, sites: Mapping[str, Size], given: Any) -> str:
    """The shortest way to name the sites: a target set, the words of PEFT's list, or all of them."""
    words = [given] if isinstance(given, str) else sorted(map(str, given or ()))
    for candidate in (*TARGETS, rf"(.*\.)?({'|'.join(words)})"):
        try:
            if find_sites(encoder, candidate).keys() == sites.keys():
                return candidate
        except EncoderError:
            continue
    return "|".join(map(re.escape, sites))


def _as_told(where: str, adapter: Adapter, told: Mapping[str, Any]) -> Adapter:
    """The adapter as it was when its folder was written."""
    try:
        return dataclasses.replace(
            adapter,
            config=AdapterConfig.from_json(told["config"]),
            basis=BasisRows(**told["basis"]) if told["basis"] else None,
            training=dict(told["training"]),
            scores={name: float(value) for name, value in told["scores"].items()},
        )
    except (LookupError, TypeError, ValueError, AttributeError, MbertError) as error:
        found = " ".join(str(error).split())
        raise ModelFileError(where, f"a broken {RECORD} ({found})", "one as mbert writes it", "remove it") from error
