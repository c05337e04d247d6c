"""JSON and YAML from strangers: plain documents are read as the libraries read them, all others are one quick line."""

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mergekit_bert import documents
from mergekit_bert.documents import DocumentError, parse_json, read_bytes, read_json, read_mapping, read_yaml

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)


def nested(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=20
    )


PLAIN = nested(st.none() | st.booleans() | NUMBERS | TEXT, TEXT)


@pytest.fixture
def hurry() -> Iterator[None]:
    """Fails where a document takes far longer than any good one."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60


def same(one: Any, two: Any) -> bool:
    """Equal, and of the same types, signs and order of keys throughout."""
    return json.dumps(one) == json.dumps(two)


@QUICK
@given(PLAIN, st.booleans(), st.sampled_from([None, 1]))
@example(
    [0.1, -0.0, 5e-324, 1e308, 2**63 - 1, "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")], True, 1
)
def test_plain_json_is_read_as_the_library_reads_it(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    for spelled in (text, text.encode(), b"\xef\xbb\xbf" + text.encode()):
        assert same(parse_json(spelled), value)


# YAML gives these characters no plain spelling that comes back, or breaks lines at them.
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff\u2028\u2029"), max_size=12)
YAML = nested(st.none() | st.booleans() | NUMBERS | WORDS, WORDS)


@QUICK
@given(st.dictionaries(WORDS, YAML, max_size=4), st.sampled_from([None, False, True]))
def test_plain_yaml_is_read_as_the_library_reads_it(tmp_path: Path, value: Any, flow: bool | None) -> None:
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, default_flow_style=flow)
    (tmp_path / "a.yml").write_text(text, encoding="utf-8")
    assert same(yaml.safe_load(text), value)
    assert same(read_yaml(tmp_path / "a.yml").value, value)


def read(tmp_path: Path, text: str | bytes) -> documents.YamlMapping:
    (tmp_path / "a.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(tmp_path / "a.yml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: yes\nb: Off\nc: TRUE\nd: 'yes'", {"a": True, "b": False, "c": True, "d": "yes"}),
        ("a: ~\nb:\nc: null\nd: 'null'", {"a": None, "b": None, "c": None, "d": "null"}),
        ("a: 1_000\nb: -3\nc: +4\nd: 1.5e+3", {"a": 1000, "b": -3, "c": 4, "d": 1500.0}),
        (
            "a: 010\nb: 0x10\nc: 0b1\nd: 1:30\ne: 1:30.5",
            {"a": "010", "b": "0x10", "c": "0b1", "d": "1:30", "e": "1:30.5"},
        ),
        (
            "a: 2020-13-45\nb: 2020-01-01\nc: 2001-12-14t21:59:43",
            {"a": "2020-13-45", "b": "2020-01-01", "c": "2001-12-14t21:59:43"},
        ),
        ("1: a\nyes: b\n2020-01-01: c\n~: d", {"1": "a", "yes": "b", "2020-01-01": "c", "~": "d"}),
        ("a: =\nb: '<<'\n'<<': c", {"a": "=", "b": "<<", "<<": "c"}),
        ("a: |\n  x\n  y\nb: >\n  x\n  y\n", {"a": "x\ny\n", "b": "x y\n"}),
        ("\ufeffa: 1", {"a": 1}),
        ("---\na: 1\n...\n", {"a": 1}),
        ('a: "\\U0001F600\\x41"', {"a": "😀A"}),
        ("{}", {}),
    ],
)
def test_what_yaml_means(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert same(read(tmp_path, text).value, expected)


def test_every_key_has_its_line(tmp_path: Path) -> None:
    assert read(tmp_path, "# a comment\na: 1\n\nb:\n  c: 2\n'd': [\n1]\n").lines == {"a": 2, "b": 4, "d": 6}


DEEP = 100_000
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{two}: &{two} [*{one}, *{one}]\n" for one, two in zip("abcdefghij", "bcdefghijk", strict=True)
)
HOSTILE_YAML: dict[str, tuple[str | bytes, int | None, str]] = {
    "laughs": (LAUGHS, 1, "an anchor or alias"),
    "an alias alone": ("a: 1\nb: *a", 2, "an anchor or alias"),
    "an anchor alone": ("a: 1\nb: &x 2", 2, "an anchor or alias"),
    "itself": ("a: &a [*a]", 1, "an anchor or alias"),
    "open brackets": ("a: " + "[" * 60_000, 1, "nested more than 64 deep"),
    "open braces": ("a: " + "{" * 60_000, 1, "nested more than 64 deep"),
    "dashes": ("- " * 30_000, 1, "nested more than 64 deep"),
    "keys in keys": ("? " * 30_000, 1, "nested more than 64 deep"),
    "indented": ("".join(" " * level + "a:\n" for level in range(300)), 64, "nested more than 64 deep"),
    "digits": ("\na: " + "9" * 4300, 2, "a number of 4,300 digits"),
    "too large": ("a: 1.0e+999", 1, "the number 1.0e+999, which is not finite"),
    "infinite": ("a: 1\nb: -.inf", 2, "-.inf, which is no number"),
    "NaN": ("a: .NaN", 1, ".NaN, which is no number"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", 1, "the tag 'tag:yaml.org,2002:python/object/"),
    "a tag of its own": ("a: ! 1", 1, "the tag '!'"),
    "a plain tag": ("a: !!str 1", 1, "the tag 'tag:yaml.org,2002:str'"),
    "a long tag": ("a: !" + "x" * 50_000 + " 1", 1, "the tag '!xxx"),
    "merged": ("a: {b: 1}\n<<: {c: 1}", 2, "a key that is no plain text"),
    "a list for a key": ("a: 1\n[b]: 1", 2, "a key that is no plain text"),
    "twice": ("a: 1\nb: 2\na: 3", 3, "the key 'a' again"),
    "twice within": ("a:\n  b: 2\n  'b': 3", 3, "the key 'b' again"),
    "half of a pair": ('a: 1\nb: "\\ud800"', 2, "half of a surrogate pair in a text"),
    "half of a pair for a key": ('a: 1\n"\\ud800": 1', 2, "half of a surrogate pair in a text"),
    "beyond all characters": ('a: "\\UFFFFFFFF"', 1, "not YAML ("),
    "a version of many digits": ("%YAML 1." + "1" * 5000 + "\n---\na: 1", 1, "not YAML ("),
    "two documents": ("a: 1\n---\nb: 1", 2, "not YAML (but found another document)"),
    "no end": ("a: 'b\nc: 1", 2, "not YAML (found unexpected end of stream)"),
    "a tab": ("a:\n\t- b", 2, "not YAML (found character '\\t' that cannot start any token)"),
    "a list": ("- a", None, "not a mapping"),
    "a word": ("a", None, "not a mapping"),
    "nothing": ("", None, "not a mapping"),
    "a comment": ("# a", None, "not a mapping"),
    "latin-1": ("a: é".encode("latin-1"), None, "no text in UTF-8"),
    "UTF-16": ("a: 1".encode("utf-16"), None, "no text in UTF-8"),
    "NUL": ("a: b\0", None, "not YAML (special characters are not allowed)"),
    "steering": ("a: \x1b[2J", None, "not YAML (special characters are not allowed)"),
    "large": ("a: " + "x" * 70_000, None, "more than 65,536 bytes"),
}


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_one_line_with_its_place(tmp_path: Path, case: str) -> None:
    text, line, message = HOSTILE_YAML[case]
    with pytest.raises(DocumentError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(message)
    assert caught.value.line == line
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    "text",
    [
        "[a" + ",a" * 9_000 + "]",
        "[" + "?," * 9_000 + "]",
        "[" + ",".join(["[" * 60 + "]" * 60] * 100) + "]",
        "\n" * 65_000,
        "a: '" + "w\n\n" * 9_000 + "'",
        "a: 1" + "_" * 65_000,
        "".join(f"k{number}: \n" for number in range(3000)),
    ],
)
def test_no_yaml_of_this_size_takes_long(tmp_path: Path, text: str) -> None:
    with contextlib.suppress(DocumentError):
        read(tmp_path, text)


HOSTILE_JSON: dict[str, tuple[bytes, str]] = {
    "brackets": (b"[" * DEEP, "nested too deeply"),
    "braces": (b'{"a":' * DEEP, "nested too deeply"),
    "65 deep": (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
    "digits": (b"[" + b"9" * 4300 + b"]", "a number of 4,300 digits"),
    "negative digits": (b"-" + b"9" * 21, "a number of 21 digits"),
    "too large": (b"1e999", "the number 1e999, which is not finite"),
    "long and too large": (b"1" * 400 + b".5", "the number 1111"),
    "NaN": (b'{"a": NaN}', "NaN, which is no number"),
    "infinite": (b"-Infinity", "-Infinity, which is no number"),
    "twice": (b'{"a": 1, "b": {"c": 1, "d": 1, "c": 2}}', "the key 'c' twice"),
    "a long key twice": (b'{"%b": 1, "%b": 1}' % (b"k" * 9999, b"k" * 9999), "the key 'kkk"),
    "half of a pair": (b'["\\ud800"]', "half of a surrogate pair in a text"),
    "the other half": (b'["\\uDC00\\uD800"]', "half of a surrogate pair in a text"),
    "half of a pair for a key": (b'{"\\udfff": 1}', "half of a surrogate pair in a text"),
    "a raw half": (b'["\xed\xa0\x80"]', "no text in UTF-8"),
    "latin-1": ('"é"'.encode("latin-1"), "no text in UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "no text in UTF-8"),
    "UTF-32": ("{}".encode("utf-32-be"), "not JSON (Expecting value)"),
    "two marks": (b"\xef\xbb\xbf" * 2 + b"{}", "not JSON (Expecting value)"),
    "nothing": (b"", "not JSON (Expecting value)"),
    "cut": (b'{"a": [1, ', "not JSON (Expecting value)"),
    "two": (b"{} {}", "not JSON (Extra data)"),
    "a raw control": (b'["\x01"]', "not JSON (Invalid control character at)"),
    "Python": (b"{'a': None}", "not JSON (Expecting property name"),
    "many values": (b"[" + b"0," * 1_000_001 + b"0]", "more than 1,000,000 values"),
    "many lists": (b"[" + b"[]," * 600_000 + b"0]", "more than 1,000,000 values"),
}


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json_is_one_line(case: str) -> None:
    text, message = HOSTILE_JSON[case]
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_the_line_of_an_error_is_told() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json('{\n"a": 1,\n"b" 2}')
    assert caught.value.line == 3


@pytest.mark.usefixtures("hurry")
def test_a_key_that_comes_twice_among_many_is_found_soon() -> None:
    text = "{" + ",".join(f'"{number}":0' for number in range(100_000)) + ',"99999":1}'
    with pytest.raises(DocumentError, match="the key '99999' twice"):
        parse_json(text)


def test_what_is_deep_but_not_too_deep_is_read() -> None:
    value: Any = "\U0001f600"
    for level in range(63):
        value = [value] if level % 2 else {"a": value}
    assert same(parse_json(json.dumps(value)), value)
    assert parse_json("[" + "[],{}," * 500 + "0]") == [[], {}] * 500 + [0]


@QUICK
@given(st.binary(max_size=60) | st.text('{}[]",:\\u dD8019eE.-+nNaIty\n', max_size=40).map(str.encode))
def test_no_bytes_give_anything_but_a_value_or_a_line(data: bytes) -> None:
    with contextlib.suppress(DocumentError):
        value = parse_json(data)
        assert same(json.loads(data), value)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@QUICK
@given(st.text("{}[]\",:\\u d8019e.-+&*!|>%@`#?' \n\taA~<=_xU", max_size=60), st.integers(0, 2**32))
def test_no_text_gives_anything_but_a_mapping_or_a_line(tmp_path: Path, text: str, seed: int) -> None:
    (tmp_path / "a.yml").write_text(f"a{random.Random(seed).choice(': ,|?')} {text}", encoding="utf-8")
    with contextlib.suppress(DocumentError):
        value = read_yaml(tmp_path / "a.yml").value
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def test_a_file_is_read_as_far_as_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}')
    assert read_bytes(path, 8) == b'{"a": 1}'
    assert read_json(path, 8) == read_mapping(path, 8) == {"a": 1}
    for read_it in (read_bytes, read_json, read_mapping, read_yaml):
        with pytest.raises(DocumentError, match="more than 7 bytes"):
            read_it(path, 7)
    path.write_bytes(b"[1]")
    with pytest.raises(DocumentError, match="a list, not an object"):
        read_mapping(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read_it in (read_json, read_mapping, read_yaml):
        for path, message in (
            (tmp_path, "a folder"),
            (tmp_path / "pipe", "no regular file"),
            (Path("/dev/zero"), "no regular file"),
            (tmp_path / "a\0b", "a path that cannot be"),
        ):
            with pytest.raises(DocumentError, match=message):
                read_it(path)
        for path in (tmp_path / "none", tmp_path / ("x" * 300)):
            with pytest.raises(OSError, match=r"No such file|name too long"):
                read_it(path)
