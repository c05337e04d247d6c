"""JSON and YAML read strictly: bounded size, depth and numbers, each key once, no aliases, no tags, no dates.

What the values mean is for the reader of each format; here they are plain lists, mappings, texts and finite numbers.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mergekit_bert.text import one_line

Json = Any
MAX_DEPTH = 64
_MAX_DIGITS = 20
"""Of a whole number: all that 64 bits can hold."""
_MAX_VALUES = 1_000_000
"""Of one document: each costs Python up to 300 bytes."""
JSON_BYTES = 32 * 2**20
YAML_BYTES = 64 * 2**10


class DocumentError(ValueError):
    """Not such a document; ``str(error)`` says why in one line. ``line`` is where, counted from 1 (None: unknown)."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        """``reason`` may hold words of the document."""
        super().__init__(one_line(reason, 200))
        self.line = line


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most ``limit`` bytes; raises OSError or :class:`DocumentError`."""
    if "\0" in str(path):
        raise DocumentError("a path that cannot be")
    if path.exists() and not path.is_file():
        raise DocumentError("a folder" if path.is_dir() else "no regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DocumentError(f"more than {limit:,} bytes")
    return data


def read_json(path: Path, limit: int = JSON_BYTES) -> Json:
    """The value in a JSON file; raises OSError or :class:`DocumentError`."""
    return parse_json(read_bytes(path, limit))


def read_mapping(path: Path, limit: int = JSON_BYTES) -> dict[str, Json]:
    """The object in a JSON file; raises OSError or :class:`DocumentError`."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise DocumentError(f"a {type(value).__name__}, not an object")
    return value


def parse_json(data: bytes | str) -> Json:
    """The value that ``data`` (UTF-8, with or without a mark) spells; raises :class:`DocumentError`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        text.encode("utf-8")
    except UnicodeError as error:
        raise DocumentError("no text in UTF-8") from error
    if len(text) > _MAX_VALUES and sum(map(text.count, ",[{")) > _MAX_VALUES:
        raise DocumentError(f"more than {_MAX_VALUES:,} values")
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise DocumentError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON ({error.msg})", error.lineno) from error
    # Most documents are small and flat, and need no second look.
    deep = ("[" in text or "{" in text[1:]) and text.count("[") + text.count("{") > MAX_DEPTH
    if deep or ("\\" in text and ("\\ud" in text or "\\uD" in text)):
        _check_plain(value)
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        left = set(found)
        for name, _ in pairs:
            if name not in left:
                raise DocumentError(f"the key {name[:40]!r} twice")
            left.remove(name)
    return found


def _whole(digits: str) -> int:
    count = len(digits.removeprefix("-"))
    if count > _MAX_DIGITS:
        raise DocumentError(f"a number of {count:,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise DocumentError(f"the number {digits[:40]}, which is not finite")
    return number


def _no_number(word: str) -> NoReturn:
    raise DocumentError(f"{word}, which is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_no_number)


def _check_plain(value: Json) -> None:
    """Refuse what is nested too deeply, and texts that are none (half of a surrogate pair, which JSON can spell)."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Json] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                _check_text(one)
        if not below:
            return
        level = below
    raise DocumentError(f"nested more than {MAX_DEPTH} deep")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError("half of a surrogate pair in a text") from error


@dataclass(frozen=True)
class YamlMapping:
    """A YAML file's mapping, and the line on which each of its keys stands."""

    value: Mapping[str, Json]
    lines: Mapping[str, int]


def read_yaml(path: Path, limit: int = YAML_BYTES) -> YamlMapping:
    """The mapping in a YAML file; raises OSError or :class:`DocumentError`.

    Dates stay texts, and keys are what is written. Aliases, anchors, tags and merged keys are refused, since they can
    make much of little.
    """
    data = read_bytes(path, limit)
    try:
        loader = _PlainLoader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise DocumentError("no text in UTF-8") from error
    except DocumentError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        raise DocumentError(f"not YAML ({problem})", mark.line + 1 if mark else None) from error
    except (ValueError, OverflowError) as error:  # PyYAML's for an escape or a version that no number holds
        raise DocumentError(f"not YAML ({error})", loader.line + 1) from error
    if not isinstance(node, yaml.MappingNode):
        raise DocumentError("not a mapping")
    value = _yaml_value(node)
    return YamlMapping(value, {key.value: key.start_mark.line + 1 for key, _ in node.value})


class _PlainLoader(yaml.SafeLoader):
    """Composes the tree of a document's nodes, and refuses on the way what is not plain."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node and all below it."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise DocumentError("an anchor or alias", line)
        if event.tag is not None:
            raise DocumentError(f"the tag {event.tag[:40]!r}", line)
        if self.depth == MAX_DEPTH:
            raise DocumentError(f"nested more than {MAX_DEPTH} deep", line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _yaml_value(node: Any) -> Json:
    """A node's plain value."""
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(one) for one in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Json] = {}
        for key, value in node.value:
            name, line = _yaml_key(key), key.start_mark.line + 1
            if name in found:
                raise DocumentError(f"the key {name[:40]!r} again", line)
            found[name] = _yaml_value(value)
        return found
    try:
        return _yaml_scalar(node.tag.rpartition(":")[2], node.value)
    except DocumentError as error:
        raise DocumentError(str(error), node.start_mark.line + 1) from error


def _yaml_key(node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:merge":
        raise DocumentError("a key that is no plain text", node.start_mark.line + 1)
    name: str = node.value
    try:
        _check_text(name)
    except DocumentError as error:
        raise DocumentError(str(error), node.start_mark.line + 1) from error
    return name


def _yaml_scalar(kind: str, text: str) -> Json:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int":
        plain = re.fullmatch(r"[+-]?(0|[1-9][0-9_]*)", text)  # not 007, 0x10 or 1:30, which mean other things elsewhere
        return _whole(text.replace("_", "").removeprefix("+")) if plain else text
    if kind == "float" and ":" not in text:
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            _no_number(text)
        return _finite(text.replace("_", ""))
    _check_text(text)
    return text
