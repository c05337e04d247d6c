"""Changes of JSON: values of the wrong kind or size, exchanged values, keys missing, unknown or there twice."""

import copy
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from tests.fuzz.mutators import BYTES, TEXT, YAML_TEXT, any_bytes, any_text
from tests.fuzz.source import Kind, Mutation, Source

Tree = Any
Path = tuple[str | int, ...]


class Raw(str):
    """JSON that is put down as it stands."""


class Twin(str):
    """A key that is spelled like another: so a dict holds one key twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        """It is equal to nothing but itself."""
        return self is other


def spell(tree: Tree) -> str:
    """``tree`` as JSON, with everything that Python's own writer would refuse."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{spell(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ",".join(map(spell, tree)) + "]"
    return json.dumps(tree)


def is_plain(tree: Tree) -> bool:
    """Whether ``tree`` has nothing that is put down as it stands, and no key twice."""
    if isinstance(tree, Raw) or (isinstance(tree, dict) and any(isinstance(key, Twin) for key in tree)):
        return False
    return all(map(is_plain, _inner(tree)))


PATTERNS = ("(a+)+$", "(.*)*(.*)*(.*)*x", r"((\w|\.)+)+!", "(([a-z.0-9])+)+;", "(", "a{9999}", "(?<=a)b", r"(.)\1", "")
"""Patterns that take for ever, or are none."""
_TEXTS = (
    *(
        "",
        " ",
        "x",
        "\x00",
        "\x1b[2J\x1b[31m",
        "\u202egnp.exe",
        "\ud800",
        "\udfff\ud800",
        "a\nb",
        "a\tb",
        "\r",
        "\ufeff",
    ),
    *(
        "e\u0301",
        "İ",
        "NaN",
        "null",
        "0",
        "-1",
        "1e999",
        "{",
        "[bold]",
        "[/nope]",
        "%s%n",
        "{0.__class__}",
        "x" * 9_000,
    ),
    *(
        "../../x",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        ".",
        "..",
        "/",
        "~",
        "nul",
        "a/b",
        "a.b",
        "a+b",
        "sst",
        "sts",
    ),
    *("base", "minilm", "orthogonal", "random", "avoid", "lora", "probe", "classify", "regress", "merged", *PATTERNS),
)
_NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        3,
        64,
        255,
        2**15,
        2**24,
        2**31 - 1,
        2**31,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
    ),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e30, 1e300, -1e300, float("nan"), float("inf"), -float("inf")),
)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [None], [[]], {"": None}, {"a": {"a": 1}}, [1, 2], ["x", "x"], {"__class__": "x"}),
    *(Raw("1e999"), Raw("-1e999"), Raw("9" * 25), Raw("9" * 5000), Raw("1" + "0" * 400), Raw("0.1" + "0" * 5000 + "1")),
    *(Raw("[" * depth + "]" * depth) for depth in (60, 100, 100_000)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (60, 900)),
    *(Raw('"\\ud800"'), Raw("'x'"), Raw("01"), Raw("+1"), Raw("0x1"), Raw(""), Raw("nan"), Raw("[1,]"), Raw("/* */1")),
)


def odd_value(source: Source) -> Tree:
    """A value that hardly any place is made for."""
    return copy.deepcopy(source.choice(source.choice((_TEXTS, _NUMBERS, _OTHERS))))


def odd_text(source: Source) -> str:
    """A text that hardly any place is made for."""
    return source.choice(_TEXTS)


def nudged(source: Source, value: Tree) -> Tree:
    """Something near ``value``: of its kind, and nearly as good."""
    if isinstance(value, bool) or value is None:
        return source.choice((not value, 0, 1, "", str(value)))
    if isinstance(value, int | float):
        return source.choice(
            (value + 1, value - 1, -value, 2 * value, value / 2, float(value), str(value), value + 1e-9, 1000 * value)
        )
    if isinstance(value, str):
        place = source.randrange(len(value) + 1)
        ways = (
            value[:place],
            value + "x",
            value[:place] + "\x1b" + value[place:],
            value.upper(),
            value + " ",
            value * 3,
        )
        return source.choice((*ways, [value], list(value), value[::-1], value.replace("0", "1")))
    if isinstance(value, list):
        return _other_list(source, value)
    return source.choice(
        (list(value.items()), list(value), dict(list(value.items())[:1]), dict(reversed(value.items())))
    )


def _other_list(source: Source, value: list[Any]) -> Tree:
    mixed = source.sample(value, len(value))
    few, many = value[: source.randrange(len(value) + 1)], value * source.choice((2, 3, 500))
    return source.choice(
        (few, many, mixed, value[::-1], [*value, odd_value(source)], [value], dict.fromkeys(map(str, value)))
    )


def place_in(source: Source, tree: Tree) -> Path:
    """The way to a value: down one branch after the other, large ones more often, but by far not by their size."""
    path: Path = ()
    while isinstance(tree, dict | list) and tree and not (path and source.random() < 0.1):
        keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = source.choices(keys, [1 + math.log2(_values(tree[one])) for one in keys])[0]
        path, tree = (*path, key), tree[key]
    return path


def _values(tree: Tree) -> int:
    """How many values there are in ``tree``."""
    return 1 + sum(map(_values, _inner(tree)))


def value_at(tree: Tree, path: Path) -> Tree:
    """What lies at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def _odd(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    parent[key] = odd_value(source)


def _near(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    parent[key] = nudged(source, parent[key])


def _exchange(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    path = place_in(source, tree)
    there = value_at(tree, path[:-1])
    parent[key], there[path[-1]] = copy.deepcopy(there[path[-1]]), copy.deepcopy(parent[key])


def _neighbours(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    other = source.choice(list(parent)) if isinstance(parent, dict) else source.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def _drop(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    del parent[key]


def _more(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[source.choice(("x", "", "\x1b[2J", "\ud800", "__class__", "sha256", str(key).upper()))] = odd_value(
            source
        )


def _rename(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    value = parent.pop(key)
    if isinstance(parent, list):
        parent.append(value)
    else:
        parent[source.choice((f"{key}x", str(key)[:-1], str(key).upper(), *_TEXTS))] = value


def _twice(source: Source, parent: Any, key: Any, tree: Tree) -> None:
    if isinstance(parent, dict):
        parent[Twin(key)] = source.choice((copy.deepcopy(parent[key]), odd_value(source)))
    else:
        parent[key] = [parent[key]] * 2


_WAYS: tuple[tuple[Callable[[Source, Any, Any, Tree], None], int], ...] = (
    *((_odd, 5), (_near, 8), (_exchange, 1), (_neighbours, 2)),
    *((_drop, 2), (_more, 1), (_rename, 1), (_twice, 1)),
)


def change_tree(source: Source, tree: Tree) -> Tree:
    """A copy of ``tree`` with one thing wrong."""
    found = copy.deepcopy(tree)
    path = place_in(source, found)
    if not path:
        source.tell("all of it replaced")
        return odd_value(source)
    way = source.choices([one for one, _ in _WAYS], [weight for _, weight in _WAYS])[0]
    old = spell(value_at(found, path))[:30]
    way(source, value_at(found, path[:-1]), path[-1], found)
    source.tell(f"{'.'.join(map(str, path))} ({old}) {way.__name__[1:]}: {_shown(found, path)}")
    return found


def _shown(tree: Tree, path: Path) -> str:
    try:
        return spell(value_at(tree, path))[:30]
    except (LookupError, TypeError):
        return "gone"


_DEEP = 120
"""Beyond it a tree is left to the changes of text: taking it apart would be too much for Python."""


def parsed(data: bytes, read: Callable[[bytes], Tree] = json.loads) -> Tree | None:
    """The tree in ``data``; None where an earlier change left none."""
    try:
        tree = read(data)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    level = [tree]
    for _ in range(_DEEP):
        level = [inner for one in level for inner in _inner(one)]
        if not level:
            return tree
    return None


def _inner(tree: Tree) -> Iterable[Tree]:
    return tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()


def json_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """A JSON file with one thing wrong in its tree."""
    tree = parsed(data)
    return any_text(source, data, other) if tree is None else spell(change_tree(source, tree)).encode()


def yaml_tree(source: Source, data: bytes, other: bytes) -> bytes:
    """A YAML file with one thing wrong in its tree; the outermost mapping stays a block, what is in it becomes JSON."""
    brackets = data.count(b"[") + data.count(b"{")  # PyYAML takes seconds for many
    tree = parsed(data, yaml.safe_load) if brackets < _DEEP else None
    if not isinstance(tree, dict):
        return any_text(source, data, other)
    found = change_tree(source, tree)
    if not isinstance(found, dict):
        return spell(found).encode()
    return "".join(f"{spell(str(key))}: {spell(value)}\n" for key, value in found.items()).encode()


def json_lines(source: Source, data: bytes, other: bytes) -> bytes:
    """A file of JSON lines with one thing wrong in one of them."""
    rows = data.split(b"\n")
    place = source.randrange(len(rows))
    rows[place] = json_tree(source, rows[place], other)
    return b"\n".join(rows)


def _texts(weight: int) -> Kind:
    return (*TEXT, Mutation("bytes", any_bytes, weight))


JSON: Kind = (Mutation("tree", json_tree, 30), *_texts(3))
YAML: Kind = (Mutation("tree", yaml_tree, 25), *YAML_TEXT, *_texts(3))
JSON_LINES: Kind = (Mutation("tree", json_lines, 20), *_texts(4))
LINES: Kind = _texts(8)
BINARY: Kind = BYTES
