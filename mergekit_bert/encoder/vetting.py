"""Checks of untrusted model folders before transformers reads them.

transformers does what a folder says: it imports code that the folder names, fetches kernels, opens other files and
bases, unpickles, and builds as many layers as ``config.json`` asks for. Here the folder's small files are read and
everything of that kind is refused. Nothing here imports torch or transformers.
"""

import json
import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bert.errors import EncoderError

CONFIG, TOKENIZER_CONFIG, TOKENS = "config.json", "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER = "tokenizer.json"
_VOCABULARIES = (TOKENIZER, "vocab.json", "added_tokens.json")
_READ = (".json", ".txt", ".model", ".jinja", ".codes")
"""Endings of the files that transformers reads, apart from weights."""
_MOST_BYTES, _MOST_CONFIG_BYTES, _DEEPEST = 2**27, 2**24, 64
_MOST_IDS, _MOST_GROWTH = 2**22, 2**10
"""A tokenizer keeps a place for every id up to the largest; rules that replace letters make texts longer."""
_MOST_LAYERS, _SMALL = 2**10, 2**16
"""Numbers in a configuration up to ``_SMALL`` are cheap, whatever but layers they count."""
_POSITION = re.compile(r"position|length|theta|rope|base")
"""Keys of numbers that may be large without anything being so large."""
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation\w*")
_PLAIN = (None, True, False, "eager", "sdpa", "flash_attention_2", "flex_attention", "batched_mm", "grouped_mm")
_REFUSED = {
    "auto_map": "code of its own",
    "quantization_config": "quantised weights",
    "transformers_weights": "weights under another name",
    "fusion_config": "changed modules",
    "init_inputs": "arguments of its own",
    "fast_tokenizer_files": "files under other names",
}
_FILE = re.compile(r"vocab|merges|\w+_(files?|object)")
"""Keys of a tokenizer that stand for files; which there are, is seen in the folder."""


@dataclass(frozen=True)
class Vetted:
    """The configurations in a folder: ``config.json`` and the tokenizer's ({} if there is none)."""

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    @property
    def named_files(self) -> tuple[str, ...]:
        """Keys of the tokenizer's configuration that stand for files; where these lie is not to be believed."""
        return tuple(key for key in self.tokenizer if _FILE.fullmatch(key))


def vet_folder(folder: Path, where: str) -> Vetted:
    """Check every file that transformers would read except weights; returns the configurations.

    ``where`` is the folder's name in messages. Raises EncoderError.
    """
    _vet_files(folder, where)
    config = read_object(folder / CONFIG, where)
    tokenizer, tokens = (_read_if_there(folder / name, where) for name in (TOKENIZER_CONFIG, TOKENS))
    for name, values in ((CONFIG, config), (TOKENIZER_CONFIG, tokenizer), (TOKENS, tokens)):
        for key, value in _pairs(values):
            if key in _REFUSED and value:
                raise _refused(where, name, f"{_REFUSED[key]} ({key})")
            if _IMPLEMENTATION.fullmatch(key) and not all(leaf in _PLAIN for leaf in _leaves(value)):
                raise _refused(where, name, f"a kernel ({key}: {value!r:.60})")
            if key.endswith("_kwargs") and not _harmless(value):
                raise _refused(where, name, f"options other than plain words ({key}: {value!r:.60})")
    if named := [key for key in tokens if _FILE.fullmatch(key)]:
        raise _refused(where, TOKENS, f"a file ({named[0]})")
    _vet_vocabulary(folder, where, tokenizer)
    longest = tokenizer.get("model_max_length")
    if longest is not None and not (type(longest) in (int, float) and longest >= 1):
        raise EncoderError(
            where, f"model_max_length is {longest!r:.60} in {TOKENIZER_CONFIG}", "a number of tokens", "correct it"
        )
    return Vetted({key: value for key, value in config.items() if key not in _REFUSED}, tokenizer)


def _vet_vocabulary(folder: Path, where: str, tokenizer: Mapping[str, Any]) -> None:
    """Raise EncoderError for ids, or rules of a tokenizer, that would fill the memory."""
    parts: dict[str, Any] = {TOKENIZER_CONFIG: list(map(int, tokenizer.get("added_tokens_decoder") or ()))}
    parts |= {name: _read_if_there(folder / name, where, _MOST_BYTES) for name in _VOCABULARIES}
    rules = parts[TOKENIZER].get("normalizer")
    parts[TOKENIZER].pop("truncation", None)  # a length to cut at, however large
    for name, values in parts.items():
        largest = max((leaf for leaf in _leaves(values) if isinstance(leaf, int)), default=0)
        if largest > _MOST_IDS:
            raise EncoderError(
                where, f"the number {largest!s:.60} in {name}", f"ids up to {_MOST_IDS}", "restore the file"
            )
    growth = math.prod(max(1, len(str(text))) for key, text in _pairs(rules) if key in ("content", "prepend"))
    if growth > _MOST_GROWTH:
        raise EncoderError(
            where,
            f"rules in {TOKENIZER} that make a text {growth} times as long",
            f"{_MOST_GROWTH}",
            "restore the file",
        )


def _harmless(options: Any) -> bool:
    """Whether options that are handed on to another library name no file."""
    return not any(_FILE.fullmatch(key) for key, _ in _pairs(options)) and all(
        re.fullmatch(r"\w*", str(leaf)) for leaf in _leaves(options) if not isinstance(leaf, float)
    )


def _refused(where: str, file: str, what: str) -> EncoderError:
    return EncoderError(
        where, f"its {file} asks for {what}", "a plain model of transformers' and its tokenizer", "use another folder"
    )


def _vet_files(folder: Path, where: str) -> None:
    if (folder / "adapter_config.json").exists():
        raise EncoderError(
            where, "it is a PEFT adapter (adapter_config.json)", "a whole encoder", "name the adapter's own base"
        )
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue  # a link to nowhere is as good as no file
        if not stat.S_ISDIR(state.st_mode) and not stat.S_ISREG(state.st_mode):
            raise EncoderError(where, f"{path.name!r} is a device or a pipe", "files", "remove it")
        if path.suffix in _READ and state.st_size > _MOST_BYTES:
            raise EncoderError(
                where, f"{path.name!r} has {state.st_size} bytes", f"at most {_MOST_BYTES}", "use another folder"
            )
    if not (folder / CONFIG).is_file():
        raise EncoderError(where, f"no {CONFIG}", "a folder of transformers'", "check the folder")
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        raise EncoderError(
            where,
            "no model.safetensors" + (f", but {pickled}, a pickle, which can run code" if pickled else ""),
            "weights in safetensors",
            'if you trust it, convert it: python -c "import sys, transformers as t; [c.from_pretrained(sys.argv[1])'
            '.save_pretrained(sys.argv[2]) for c in (t.AutoModelForSequenceClassification, t.AutoTokenizer)]" '
            "FOLDER NEW_FOLDER",
        )


def read_object(path: Path, where: str, most: int = _MOST_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of at most ``most`` bytes and of reasonable depth, with each key once; raises EncoderError."""
    try:
        if path.stat().st_size > most:
            raise ValueError(f"more than {most} bytes")
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=_each_once, parse_constant=_no_number)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
        if _depth(value) > _DEEPEST:
            raise ValueError("nested too deep")
        return value
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise EncoderError(
            where, f"{path.name} cannot be read ({found})", "a JSON object", "restore the file"
        ) from error


def _read_if_there(path: Path, where: str, most: int = _MOST_CONFIG_BYTES) -> dict[str, Any]:
    return read_object(path, where, most) if path.is_file() else {}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key that is there twice")
    return values


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, which is not JSON")


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level = [inner for one in level for inner in _inner(one) if isinstance(inner, dict | list)]
        depth += 1
    return depth


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth and its value."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in _inner(value):
        if isinstance(inner, dict | list):
            yield from _pairs(inner)


def _leaves(value: Any) -> Iterator[Any]:
    """Every value at any depth that holds no others."""
    if not isinstance(value, dict | list):
        yield value
    for inner in _inner(value):
        if isinstance(inner, dict | list):
            yield from _leaves(inner)
        else:
            yield inner


def vet_numbers(values: Mapping[str, Any], largest: int, where: str) -> None:
    """Raise EncoderError for a number in a configuration that no model of these weights has.

    ``largest`` is the largest dimension of the weights: a size beyond it would be that of something that the folder
    does not hold.
    """
    for key, value in values.items():
        if "layer" in key:
            most = _MOST_LAYERS
        elif "label" in key:
            most = _SMALL
        else:
            most = 2**31 - 1 if _POSITION.search(key) else max(largest, _SMALL)
        for number in _leaves(value):
            if isinstance(number, int) and abs(number) > most:
                raise EncoderError(
                    where, f"{key} is {number} in {CONFIG}", f"at most {most} with these weights", "restore the file"
                )
