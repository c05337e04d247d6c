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

from torch import Tensor, nn

from mergekit_bert.encoder.load import (
    Encoder,
    load_encoder,
    longest,
    open_base,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from mergekit_bert.encoder.places import base_folder
from mergekit_bert.encoder.pretrained import one_line, present_name, quiet_transformers
from mergekit_bert.tensorfile import StoredTensors


class StoredWeights(Mapping[str, Tensor]):
    """An encoder's parameters by name, in float32, each read from a folder when it is asked for.

    ``rest`` are the names of the folder's other tensors: those of a head.
    """

    def __init__(self, tensors: StoredTensors, prefix: str, wanted: Iterable[str]) -> None:
        """Find every parameter, whether or not the folder puts the architecture's ``prefix`` before its name."""
        self.tensors, self.rest = tensors, list[str]()
        found, names = {}, set(wanted)
        for name in tensors:
            told = present_name(name).removeprefix(f"{prefix}.")
            if told in names:
                found[told] = name
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
    with quiet_transformers():
        folder = base_folder(name)
    state = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(folder)))
    return _opened(str(name), folder, state) or load_encoder(name)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


@functools.lru_cache(maxsize=2)
def _opened(name: str, folder: Path, state: object) -> StoredEncoder | None:
    """The stored encoder, None where weights are missing; ``state`` changes when the folder does."""
    found = open_base(name)
    model, config, tokenizer = found.shell().base_model, found.config, found.tokenizer()
    weights = LastKept(*_stored(found.tensors, model))
    if weights.keys() != dict(model.named_parameters()).keys():
        return None
    with one_line(found.where):
        return StoredEncoder(
            name=name,
            config=config,
            model=model.requires_grad_(False),
            tokenizer=tokenizer,
            fingerprint=weights_fingerprint(weights),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            max_length=longest(model, config, tokenizer),
            stored=weights,
        )


def stored_weights(tensors: StoredTensors, model: nn.Module) -> StoredWeights:
    """Those parameters of an encoder's ``model`` that are among a folder's ``tensors``."""
    return StoredWeights(*_stored(tensors, model))


def _stored(tensors: StoredTensors, model: Any) -> tuple[StoredTensors, str, list[str]]:
    return tensors, model.base_model_prefix, [name for name, _ in model.named_parameters()]


def is_buffer(name: str) -> bool:
    """Whether a tensor's name is that of a table of positions, which older versions of transformers wrote too."""
    return re.search(r"(position_ids|token_type_ids)$", name) is not None
