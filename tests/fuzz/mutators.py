"""Changes of bytes and of text, for files of any kind."""

import re
import struct

from tests.fuzz.source import Change, Mutation, Source

_WHOLE = (0, 1, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
"""Numbers at which programs count wrongly."""


def _span(source: Source, data: bytes, most: int = 64) -> tuple[int, int]:
    """Begin and end of a piece, short ones more often."""
    start = source.randrange(len(data) + 1)
    return start, min(len(data), start + source.randint(1, source.choice((1, 4, most))))


def flip(source: Source, data: bytes, other: bytes) -> bytes:
    """Some bits turned over."""
    found = bytearray(data or b"\0")
    for _ in range(source.choice((1, 1, 2, 8))):
        place, bit = source.randrange(len(found)), source.randrange(8)
        found[place] ^= 1 << bit
        source.tell(f"bit {bit} of byte {place}")
    return bytes(found)


def insert(source: Source, data: bytes, other: bytes) -> bytes:
    """Random bytes put in."""
    start, _ = _span(source, data)
    piece = source.randbytes(source.choice((1, 2, 8, 64)))
    source.tell(f"{len(piece)} bytes put in at {start}")
    return data[:start] + piece + data[start:]


def delete(source: Source, data: bytes, other: bytes) -> bytes:
    """A piece taken out."""
    start, end = _span(source, data)
    source.tell(f"bytes {start} to {end} taken out")
    return data[:start] + data[end:]


def repeat(source: Source, data: bytes, other: bytes) -> bytes:
    """A piece put down several times."""
    start, end = _span(source, data, 256)
    times = source.choice((2, 3, 50))
    source.tell(f"bytes {start} to {end} {times} times")
    return data[:start] + data[start:end] * times + data[end:]


def splice(source: Source, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    one, two = source.randrange(len(data) + 1), source.randrange(len(other) + 1)
    source.tell(f"{one} bytes, then another file from byte {two} on")
    return data[:one] + other[two:]


def truncate(source: Source, data: bytes, other: bytes) -> bytes:
    """The end cut off: anywhere, or next to it."""
    end = source.choice((source.randrange(len(data) + 1), max(0, len(data) - source.randint(1, 9)), 0))
    source.tell(f"cut to {end} bytes")
    return data[:end]


def extend(source: Source, data: bytes, other: bytes) -> bytes:
    """More at the end."""
    more = source.choice((b"\0", b"\n", b" ", source.randbytes(8), data, b"\0" * 4096))
    source.tell(f"{len(more)} bytes at the end")
    return data + more


def number(source: Source, data: bytes, other: bytes) -> bytes:
    """A number at which programs count wrongly, written over some bytes: often at the front, where lengths stand."""
    form = source.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    value = source.choice((*_WHOLE, len(data), len(data) + 1)) % 256 ** struct.calcsize(form)
    place = 0 if source.random() < 0.25 else source.randrange(len(data) + 1)
    source.tell(f"{value} as {form} at byte {place}")
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]


BYTES: tuple[Mutation, ...] = tuple(
    Mutation(change.__name__, change) for change in (flip, insert, delete, repeat, splice, truncate, extend, number)
)

_ODD = (
    *("\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\u00a0", "\u0660", "\U0001f600", "e\u0301", "İ"),
    *("\t", "\r", "\n", "\r\n", "\v", "\f", " ", "'", '"', "\\", "`", "#", "%s", "{}", "${HOME}", "../", "~", "-", "0"),
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "null",
        "true",
        "~",
        "yes",
        "0x10",
        "007",
        "1_000",
        "1:30",
        "2020-01-01",
        "1e999",
    ),
    *("=1+1", "<b>", "[bold red]", "[/]", "\\N{BULLET}", "\\ud800", "\\u0000", "x" * 5000, " " * 5000),
)
"""Texts that readers take for something else."""
_BRACKETS = ("[", "]", "{", "}", "(", ")", '{"a":', "[[", "- ", "? ", ": ", "<", "((((")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _data(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def oddity(source: Source, data: bytes, other: bytes) -> bytes:
    """A text that readers take for something else, put anywhere or in place of a word."""
    text, odd = _text(data), source.choice(_ODD)
    words = list(re.finditer(r"[\w.-]+", text))
    if words and source.random() < 0.5:
        start, end = source.choice(words).span()
    else:
        start = end = source.randrange(len(text) + 1)
    source.tell(f"{odd[:20]!r} in place of {text[start:end][:20]!r}")
    return _data(text[:start] + odd + text[end:])


def brackets(source: Source, data: bytes, other: bytes) -> bytes:
    """An opening or closing, once or so often that nothing should follow it."""
    text, one = _text(data), source.choice(_BRACKETS)
    place = source.choice((0, source.randrange(len(text) + 1)))
    times = source.choice((1, 1, 70, 2000, 100_000 // len(one)))
    source.tell(f"{one!r} {times} times at {place}")
    return _data(text[:place] + one * times + text[place:])


def digits(source: Source, data: bytes, other: bytes) -> bytes:
    """A number made long, negative, broken or large."""
    text = _text(data)
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not found:
        return oddity(source, data, other)
    start, end = source.choice(found).span()
    old = text[start:end]
    new = source.choice(
        ("-" + old, old + "0", old * 2, "9" * 20, "9" * 400, "9" * 5000, old + ".5", old + "e30", "1e-400", "-0.0", "")
    )
    source.tell(f"{new[:20]} in place of the number {old}")
    return _data(text[:start] + new + text[end:])


def lines(source: Source, data: bytes, other: bytes) -> bytes:
    """Lines taken out, doubled, exchanged, joined, or ended as elsewhere."""
    text = _text(data)
    found = text.split("\n")
    place, second = source.randrange(len(found)), source.randrange(len(found))
    way = source.choice(("out", "twice", "exchanged", "joined", "crlf", "cr", "indented"))
    source.tell(f"line {place + 1} {way}")
    if way == "out":
        del found[place]
    elif way == "twice":
        found.insert(second, found[place])
    elif way == "exchanged":
        found[place], found[second] = found[second], found[place]
    elif way == "joined":
        found[place : place + 2] = ["".join(found[place : place + 2])]
    elif way == "indented":
        found[place] = source.choice((" ", "  ", "\t")) + found[place]
    else:
        return _data(text.replace("\n", "\r\n" if way == "crlf" else "\r"))
    return _data("\n".join(found))


def words(source: Source, data: bytes, other: bytes) -> bytes:
    """Two words exchanged, or one of another file put in."""
    text = _text(data)
    found, foreign = list(re.finditer(r"\w+", text)), re.findall(r"\w+", _text(other))
    if not found or not foreign:
        return oddity(source, data, other)
    one = source.choice(found)
    new = source.choice((source.choice(found)[0], source.choice(foreign)))
    source.tell(f"{new[:20]!r} in place of {one[0][:20]!r}")
    return _data(text[: one.start()] + new + text[one.end() :])


def mark(source: Source, data: bytes, other: bytes) -> bytes:
    """Another encoding, or a mark of one."""
    text = _text(data)
    way = source.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp500"))
    source.tell(f"written in {way}")
    return text.encode(way, "replace")


_TEXT = ((oddity, 3), (brackets, 2), (digits, 2), (lines, 2), (words, 2), (mark, 1))
TEXT: tuple[Mutation, ...] = tuple(Mutation(change.__name__, change, weight) for change, weight in _TEXT)

_YAML = (
    "!!python/object/apply:os.getcwd []",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2001-12-14",
    "!<tag:yaml.org,2002:int> '1'",
    "&a [*a]",
    "&a {b: *a}",
    "*unknown",
    "{<<: {a: 1}}",
    "|\n  several\n  lines",
    "? [a, b]\n: c",
    "!!float .nan",
    "-.inf",
    "0o17",
    "12:30:45",
    "%TAG ! tag:x,2000:",
    "--- a\n--- b",
)
"""What YAML can say beyond plain keys and values."""


def yaml_words(source: Source, data: bytes, other: bytes) -> bytes:
    """What YAML can say beyond plain keys and values, in place of a value."""
    text, odd = _text(data), source.choice(_YAML)
    found = list(re.finditer(r"(?<=[:-] )[^\n]+", text))
    start, end = source.choice(found).span() if found else (len(text), len(text))
    source.tell(f"{odd!r} in place of {text[start:end][:20]!r}")
    return _data(text[:start] + odd + text[end:])


def aliases(source: Source, data: bytes, other: bytes) -> bytes:
    """A few lines of aliases that spell a great deal, under a key of their own or in place of a value."""
    levels = source.choice((2, 4, 9, 30))
    rows = ["a0: &a0 [x, x]"]
    rows += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    text = "\n".join(rows) + "\n" + _text(data)
    source.tell(f"aliases of aliases, {levels} deep")
    return _data(re.sub(r"(?<=: )[^\n]+$", f"*a{levels - 1}", text))


YAML_TEXT: tuple[Mutation, ...] = (Mutation("yaml words", yaml_words, 4), Mutation("aliases", aliases, 2))


def _whole_text(changes: tuple[tuple[Change, int], ...]) -> Change:
    def change(source: Source, data: bytes, other: bytes) -> bytes:
        return source.choices([one for one, _ in changes], [weight for _, weight in changes])[0](source, data, other)

    return change


any_text: Change = _whole_text(_TEXT)
"""One of the changes of text."""
any_bytes: Change = _whole_text(tuple((one.change, 1) for one in BYTES))
"""One of the changes of bytes."""
