"""Encoders whose weights stay in their folder: names and shapes in memory, values read one at a time.

For work that goes through a whole model once, such as merging checkpoints. What must run a model loads it with
:func:`~mergekit_bert.encoder.load.load_encoder`.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bert.encoder.load import (
    MINILM,
    Encoder,
    load_encoder,
    longest,
    minilm_folder,
    quiet_transformers,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from mergekit_bert.errors import ModelFileError
from mergekit_bert.tensorfile import StoredTensors

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class StoredWeights(Mapping[str, Tensor]):
    """An encoder's parameters by name, in float32, each read from a folder when it is asked for.

    ``rest`` are the names of the folder's other tensors: those of a head.
    """

    def __init__(self, tensors: StoredTensors, prefix: str, wanted: Iterable[str]) -> None:
        """Find every parameter, whether or not the folder puts the architecture's ``prefix`` before its name."""
        self.tensors, self.rest = tensors, list[str]()
        found, names = {}, set(wanted)
        for name in tensors:
            told = functools.reduce(lambda text, pair: text.replace(*pair), _OLD_NAMES.items(), name)
            if told.removeprefix(f"{prefix}.") in names:
                found[told.removeprefix(f"{prefix}.")] = name
            else:
                self.rest.append(name)
        self._names = {name: found[name] for name in sorted(found)}
        self.shapes = {name: tensors.shapes[stored] for name, stored in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The parameter, a tensor of the caller's own."""
        weight: Tensor = self.tensors[self._names[name]].float()
        return weight

    def __contains__(self, name: object) -> bool:
        """Whether the folder has this parameter."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


class LastKept(StoredWeights):
    """The same, with the last one read kept: of a base, which all inputs of a merge ask for the same one in turn."""

    _last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The parameter, not to be changed in place."""
        last = self._last
        if last is None or last[0] != name:
            self._last = last = None  # let it go before the next is read
            self._last = last = (name, super().__getitem__(name))
        return last[1]


@dataclass(frozen=True)
class StoredEncoder(Encoder):
    """An encoder that cannot run: ``model`` lies on the meta device, ``stored`` reads the values."""

    stored: StoredWeights

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name, read when asked for."""
        return self.stored


def open_encoder(name: str | Path) -> Encoder:
    """The encoder ``name``, stored where its folder holds every weight in safetensors; else loaded.

    Raises what :func:`~mergekit_bert.encoder.load.load_encoder` raises.
    """
    folder = minilm_folder() if str(name) == MINILM else Path(name)
    if not (folder / "config.json").is_file():
        return load_encoder(name)
    state = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()))
    return _opened(str(name), folder, state) or load_encoder(name)


@functools.lru_cache(maxsize=2)
def _opened(name: str, folder: Path, state: object) -> StoredEncoder | None:
    """The stored encoder, None where the folder is not plain; ``state`` changes when the folder does."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            shell, tokenizer = _skeleton(folder), AutoTokenizer.from_pretrained(str(folder))
        weights = LastKept(*_stored(folder, shell.base_model))
    except (OSError, ValueError, KeyError, RuntimeError, ModelFileError):
        return None  # loading it tells what is wrong
    shapes = {name: tuple(parameter.shape) for name, parameter in shell.base_model.named_parameters()}
    if weights.shapes != shapes or shell.config.is_encoder_decoder:
        return None
    return StoredEncoder(
        name=name,
        config=shell.config,
        model=shell.base_model,
        tokenizer=tokenizer,
        fingerprint=weights_fingerprint(weights),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        max_length=longest(shell.base_model, shell.config, tokenizer),
        stored=weights,
    )


def _skeleton(folder: Path) -> Any:
    """A transformers model for sequence classification as ``folder`` describes it, without values."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).requires_grad_(False)


def open_weights(folder: Path, model: nn.Module) -> StoredWeights:
    """Those parameters of an encoder's ``model`` that ``folder`` holds; raises ModelFileError."""
    return StoredWeights(*_stored(folder, model))


def _stored(folder: Path, model: Any) -> tuple[StoredTensors, str, list[str]]:
    return StoredTensors(folder), model.base_model_prefix, [name for name, _ in model.named_parameters()]


def is_buffer(name: str) -> bool:
    """Whether a tensor's name is that of a table of positions, which older versions of transformers wrote too."""
    return re.search(r"(position_ids|token_type_ids)$", name) is not None
