"""Text fit to be shown: what could steer a terminal is escaped, what is long is cut, the rest stays as it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert.errors import MbertError
from mergekit_bert.text import has_control_characters, one_line, printable

ANY = st.text(st.characters(), max_size=60)
"""With lone surrogates: they come from JSON and from file names."""
quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)

STEERING = {
    "escape": "\x1b[2J",
    "bell": "a\x07",
    "backspace": "ab\x08",
    "delete": "\x7f",
    "C1": "\x9b31m",
    "next line": "a\x85b",
    "carriage return": "safe\revil",
    "line separator": "a\u2028b",
    "right to left": "\u202etxt.exe",
    "isolate": "a\u2066b",
    "half a pair": "a\udc80",
    "zero": "a\0b",
}


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_a_terminal_is_escaped(name: str) -> None:
    shown = printable(STEERING[name])
    assert shown.isprintable()
    assert "\\" in shown
    assert has_control_characters(STEERING[name])
    assert one_line(STEERING[name]).isprintable()


@pytest.mark.parametrize("text", ["", "plain", "ça, 文字, עברית, 👍🏽", "two\nlines\tand\r\na tab", "back\\slash"])
def test_what_does_not_is_kept(text: str) -> None:
    assert printable(text) == text
    assert has_control_characters(text) == any(sign in text for sign in "\t\n\r")


def test_a_long_text_is_cut_and_says_so() -> None:
    assert printable("abcdef", 6) == "abcdef"
    assert printable("abcdefg", 6) == "abcde…"
    assert one_line("  a \n\n b\tc  ", 5) == "a b c"
    assert one_line("word " * 1000, 9) == "word wor…"


@quick
@given(ANY, st.integers(1, 40))
def test_no_text_is_longer_or_less_printable_than_asked(text: str, limit: int) -> None:
    for shown in (printable(text, limit), one_line(text, limit)):
        assert len(shown) <= limit
        shown.encode()  # no surrogate is left
        assert not has_control_characters(shown.translate(dict.fromkeys(map(ord, "\t\n\r"))))
    assert not has_control_characters(one_line(text))
    assert printable(printable(text)) == printable(text)


@quick
@given(st.lists(ANY, min_size=4, max_size=4))
def test_an_error_is_one_line_whatever_it_holds(parts: list[str]) -> None:
    message = str(MbertError(*parts))
    assert not has_control_characters(message)
    message.encode()


def test_an_error_does_not_print_a_whole_value() -> None:
    error = MbertError("where", "x" * 10**6, "\x1b" * 10**6, "remedy")
    assert len(str(error)) < 3000
    assert (error.where, error.remedy, error.found[-1], error.expected[:4]) == ("where", "remedy", "…", "\\x1b")
