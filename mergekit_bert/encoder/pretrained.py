"""Loads a folder's configuration, tokenizer and model: the only module that calls the loaders of transformers.

Code and pickles in a folder are never executed, the user is never prompted, and memory is allocated only after the
shapes of the weights on disk have been compared with the configuration. transformers gets a configuration that
:mod:`~mergekit_bert.encoder.vetting` has checked, and tensors instead of the folder. Errors are one line.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mergekit_bert.encoder.vetting import Vetted, vet_folder, vet_numbers
from mergekit_bert.errors import EncoderError, MbertError
from mergekit_bert.tensorfile import StoredTensors

EXPECTED, REMEDY = "a folder with a transformers encoder and its tokenizer", "check the folder"
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_LOADING = RLock()
"""Held while transformers is quiet: how loud it is, is one setting for all threads."""
_CALLS_A_TENSOR, _CALLS = 32, 2**12
"""Limit of operations for building a model: about 6 are needed per tensor, and half of the tensors may be missing."""
_TOKENIZER = re.compile(r"\w{1,60}(Tokenizer|TokenizerFast|Backend)")
_SPARE = 2**24
"""Values that a model may have beyond those of its weights: buffers, a head."""


@dataclass(frozen=True)
class Pretrained:
    """A vetted folder: its configuration, and its weights on disk; ``where`` is its name in messages."""

    folder: Path
    where: str
    vetted: Vetted
    tensors: StoredTensors
    config: Any

    def shell(self) -> Any:
        """The model for sequence classification that the folder describes and its weights fit, on the meta device."""
        try:
            # no_grad stands outside: what restores it must not be refused too.
            with one_line(self.where), torch.no_grad(), _Limited(_CALLS + _CALLS_A_TENSOR * len(self.tensors)):
                shell = skeleton(self.config)
        except _TooLargeError as error:
            found = f"config.json asks for more layers than its {len(self.tensors)} tensors make"
            raise EncoderError(self.where, found, EXPECTED, REMEDY) from error
        _check_shapes(self.where, shell, self.tensors)
        return shell

    def load(self) -> tuple[Any, set[str]]:
        """The model in float32 on the CPU, and the names of parameters that are missing in the folder."""
        shell = self.shell()
        with quiet_transformers(), one_line(self.where):
            shell, info = type(shell).from_pretrained(
                None,
                config=self.config,
                state_dict={name: self.tensors[name] for name in self.tensors},
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            shell.config.name_or_path = str(self.folder)
        return shell, set(info["missing_keys"])

    def tokenizer(self) -> Any:
        """The tokenizer, without the truncation and padding that its file may ask for.

        A fast tokenizer keeps both as state, and a call that asks for neither would change it under other threads.
        """
        from transformers import AutoTokenizer

        with quiet_transformers(), one_line(self.where):
            for values in (self.vetted.config, self.vetted.tokenizer):
                _check_tokenizer_class(self.where, values.get("tokenizer_class"))
            tokenizer = AutoTokenizer.from_pretrained(
                str(self.folder),
                config=self.config,
                trust_remote_code=False,
                **dict.fromkeys(self.vetted.named_files),
            )
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is not None:  # some rules are followed only now, and may not hold
                backend.no_truncation()
                backend.no_padding()
                backend.encode("a", "b")
                backend.encode("a")
            return tokenizer


def open_pretrained(folder: Path, where: str) -> Pretrained:
    """Vet ``folder`` and read its configuration; raises EncoderError."""
    with quiet_transformers(), one_line(where):
        vetted, tensors = vet_folder(folder, where), StoredTensors(folder)
        return Pretrained(folder, where, vetted, tensors, _config(folder, where, vetted, tensors))


def skeleton(config: Any) -> Any:
    """transformers' model for sequence classification of a configuration, on the meta device."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )


def _config(folder: Path, where: str, vetted: Vetted, tensors: StoredTensors) -> Any:
    """The configuration, from what was vetted and not from the folder again."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind = str(vetted.config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        found = f"model_type is {kind!r:.60} in config.json"
        raise EncoderError(where, found, "an encoder that transformers can classify with", REMEDY)
    kind_of_config = CONFIG_MAPPING[kind]
    known = {*kind_of_config().to_dict(), *kind_of_config.attribute_map, "num_labels"}
    largest = max((size for shape in tensors.shapes.values() if 0 not in shape for size in shape), default=0)
    vet_numbers({key: value for key, value in vetted.config.items() if key in known}, largest, where)
    config = kind_of_config.from_dict(dict(vetted.config), name_or_path=str(folder))
    if config.is_encoder_decoder:
        raise EncoderError(
            where,
            f"a {config.model_type} model, which has an encoder and a decoder",
            "an encoder alone",
            "name another `base`",
        )
    return config


def _check_tokenizer_class(where: str, name: str | None) -> None:
    """Raise EncoderError for the name of some other thing of transformers'; unknown names mean its usual class."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    plain = (name or "").removesuffix("Fast")
    found = [tokenizer_class_from_name(one) for one in (plain, f"{plain}Fast") if _TOKENIZER.fullmatch(one)]
    if name and not (found and all(one is None or issubclass(one, PreTrainedTokenizerBase) for one in found)):
        raise EncoderError(where, f"tokenizer_class {name!r:.60} is no tokenizer", EXPECTED, REMEDY)


def _check_shapes(where: str, shell: Any, tensors: StoredTensors) -> None:
    """Raise EncoderError unless the weights on disk account for the model that the configuration describes."""
    prefix = f"{shell.base_model_prefix}."
    shapes = {present_name(name).removeprefix(prefix): shape for name, shape in tensors.shapes.items()}
    missing = sum(buffer.numel() for buffer in shell.buffers())
    for name, parameter in shell.named_parameters():
        shape = shapes.get(name.removeprefix(prefix))
        if shape is None:
            missing += parameter.numel()
        elif shape != tuple(parameter.shape):
            raise EncoderError(
                where, f"{name} has shape {shape}", f"{tuple(parameter.shape)}, as config.json has it", REMEDY
            )
    stored = sum(map(math.prod, tensors.shapes.values()))
    if missing > 2 * stored + _SPARE:
        found = f"config.json describes a model with {missing} values that are not among the {stored} of its weights"
        raise EncoderError(where, found, EXPECTED, REMEDY)


def present_name(name: str) -> str:
    """A parameter's current name in transformers."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


class _TooLargeError(Exception):
    """More operations than a model of these weights takes."""


class _Limited(TorchFunctionMode):
    """Stops building a model after a number of torch operations."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left = calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _TooLargeError
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def one_line(where: str) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or torch raise over a folder into an EncoderError."""
    try:
        yield
    except (EncoderError, _TooLargeError, KeyboardInterrupt, SystemExit):
        raise
    except MbertError as error:
        raise EncoderError(
            where, f"it cannot be loaded ({error.where}: {error.found})", error.expected, error.remedy
        ) from error
    except BaseException as error:  # tokenizers' panics are no Exceptions
        text = "".join(letter if letter.isprintable() else " " for letter in str(error)) or type(error).__name__
        raise EncoderError(where, f"it cannot be loaded ({' '.join(text.split())[:160]})", EXPECTED, REMEDY) from error


@contextlib.contextmanager
def told_as(kind: type[MbertError]) -> Iterator[None]:
    """Raise the block's EncoderError as another kind of error, the same line."""
    try:
        yield
    except EncoderError as error:
        raise kind(error.where, error.found, error.expected, error.remedy) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, which reports newly initialised heads (mbert has its own)."""
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
