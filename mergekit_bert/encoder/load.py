"""Encoders: a Hugging Face model and its tokenizer, frozen, with fingerprints of both.

An :class:`Encoder` is never edited. For a changed model, :func:`~mergekit_bert.encoder.classifier.classifier` makes a
copy of the module tree that shares the encoder's tensors.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mergekit_bert.arguments import checked
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.places import base_folder
from mergekit_bert.encoder.pretrained import Pretrained, one_line, open_pretrained, quiet_transformers
from mergekit_bert.errors import EncoderError, MbertWarning, ModelFileError
from mergekit_bert.files import fingerprint
from mergekit_bert.hardware import default_device, generator, global_seed_kept
from mergekit_bert.schema import STRICT, BaseName, Sha256


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder in float32.

    ``fingerprint`` is the SHA-256 of its weights, ``tokenizer_fingerprint`` that of its vocabulary and rules,
    ``max_length`` the maximum number of tokens in a sequence.
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
        """The id of the padding token (0 if the tokenizer has none, because padding is masked anyway)."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def words(self) -> nn.Embedding:
        """The embeddings of tokens."""
        embeddings: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}


@dataclass(frozen=True)
class Base:
    """The identity of the encoder that a model was trained on: its name and fingerprints."""

    name: BaseName
    fingerprint: Sha256
    tokenizer_fingerprint: Sha256

    __pydantic_config__: ClassVar = STRICT

    @classmethod
    def of(cls, encoder: Encoder) -> "Base":
        """The identity of ``encoder``."""
        return cls(encoder.name, encoder.fingerprint, encoder.tokenizer_fingerprint)


def check_base(where: str, base: Base, encoder: Encoder) -> None:
    """Raise ModelFileError unless ``encoder`` is the base that the file was made for."""
    if base.fingerprint != encoder.fingerprint:
        raise ModelFileError(
            where,
            f"made for base {base.name!r} (weights {base.fingerprint[:12]})",
            f"base {encoder.name!r} (weights {encoder.fingerprint[:12]})",
            "give the `base` it was trained on",
        )
    if base.tokenizer_fingerprint != encoder.tokenizer_fingerprint:
        raise ModelFileError(
            where,
            f"made with another tokenizer ({base.tokenizer_fingerprint[:12]})",
            f"the tokenizer of {encoder.name!r} ({encoder.tokenizer_fingerprint[:12]})",
            "restore the tokenizer it was trained with",
        )


def open_base(name: str | Path) -> Pretrained:
    """The folder of the base ``name``, its weights not yet read; raises EncoderError or MissingExtraError."""
    with quiet_transformers():
        return open_pretrained(base_folder(name), f"base {str(name)!r:.200}")


@checked
def load_encoder(name: str | Path) -> Encoder:
    """Load ``minilm``, a local folder or a Hub name; raises EncoderError or MissingExtraError.

    No code in the folder is run, and a folder that describes a larger model than its weights is refused.
    """
    found = open_base(name)
    with global_seed_kept():
        shell, missing = found.load()
    tokenizer = found.tokenizer()
    model = shell.base_model
    _fill_missing(str(name), model, shell.base_model_prefix, missing, shell.config)
    with one_line(found.where):
        model.eval().requires_grad_(False).to(default_device())
        try_out(model, tokenizer)
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


def try_out(model: Any, tokenizer: Any) -> None:
    """Encode a word, because a configuration that fits the shapes of the weights may still fail to run."""
    with torch.inference_mode():
        model(**tokenizer("a", return_tensors="pt").to(default_device()))


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
    """The number of positions, without those that RoBERTa-like models never use: padding_idx and below."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= int(module.padding_idx) + 1
    return int(min(positions, tokenizer.model_max_length))


def _fill_missing(name: str, model: nn.Module, prefix: str, missing: set[str], config: Any) -> None:
    """Initialise weights that the checkpoint lacks (such as a pooler) with the same values at every load."""
    parameters = dict(model.named_parameters())
    lacking = sorted(name for name in parameters if f"{prefix}.{name}" in missing)
    if len(lacking) > len(parameters) / 2:
        raise EncoderError(
            f"base {name!r}",
            f"{len(lacking)} of {len(parameters)} weights are missing",
            f"a checkpoint of a {config.model_type} encoder",
            "check `base`",
        )
    source = generator(0, 5)
    for key in lacking:
        reset(key, parameters[key], config, source)
    if lacking:
        warnings.warn(
            f"base {name!r}: the checkpoint lacks {', '.join(lacking)}; fixed random values are used instead",
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
