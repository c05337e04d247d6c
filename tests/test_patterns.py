"""Patterns of names: what Python's ``re`` says, in linear time; what cannot be is refused in one line."""

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bert.patterns import MAX_LENGTH, PatternError, check_patterns, exactly, matches, matches_ending
from tests.hang import HANGS, in_time

quick = settings(max_examples=250, deadline=None, derandomize=True, database=None)

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c.]", "()", "^", "$", r"\b", "-", "1"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map("({})".format),
        inner.map("(?:{})".format),
        inner.map("(?i:{})".format),
    ),
    max_leaves=8,
)
NAMES = st.text("ab1.B-", min_size=1, max_size=9)


@quick
@given(PATTERNS, st.lists(NAMES, min_size=1, max_size=20))
def test_the_answer_is_pythons(pattern: str, names: list[str]) -> None:
    check_patterns([pattern])
    for name in names:
        assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None), (pattern, name)
        ending = re.match(rf"(.*\.)?({pattern})$", name)  # PEFT's, in get_pattern_key
        assert matches_ending(pattern, name) == (ending is not None), (pattern, name)


@quick
@given(st.text(r"ab1.\()[]{}*+?|^$-,:dwPi=!<>", max_size=12), NAMES)
def test_whatever_is_taken_is_taken_as_python_does(pattern: str, name: str) -> None:
    with contextlib.suppress(PatternError):
        check_patterns([pattern])
        assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None)


SLOW = {
    "nested repetition": HANGS,
    "choices that are alike": r"(a|a|[a-z.0-9])*!",
    "many stars": ".*" * 200 + "!",
    "optional repetition": r"(?:[a-z.0-9]*e?){200}!",
    "counted": r"(([a-z]*){30}){30}!",
}


@pytest.mark.parametrize("name", SLOW)
def test_no_pattern_hangs(name: str) -> None:
    with in_time():
        check_patterns([SLOW[name]])
        for layer in range(100):
            assert not matches(SLOW[name], f"encoder.layer.{layer}.attention.output.dense")
            assert not matches_ending(SLOW[name], f"encoder.layer.{layer}.attention.output.dense")


REFUSED = {
    "(": "'(' (missing ), unterminated subpattern",
    "*": "nothing to repeat",
    "a**": "multiple repeat",
    "a)|(b": "unbalanced parenthesis",
    "(?=a)": "RE2 knows neither lookaround nor backreferences",
    "(?<!a)b": "RE2 knows neither lookaround nor backreferences",
    r"(a)\1": "RE2 knows neither lookaround nor backreferences",
    "(?>a)": "RE2 knows",
    "a*+": "RE2 knows",
    "a{1001}": "invalid repetition size",
    "(a{1000}){1000}": "invalid repetition size",
    "a{99999999999999}": "repetition number is too large",
    "a{,2}": "'{,', which is not the same everywhere",
    "[[:alpha:]]": "'[:', which is not the same everywhere",
    r"\pL": r"bad escape \p",
    r"\C": r"bad escape \C",
    "a(?i)b": "global flags not at the start",
    "é": "a character beyond ASCII",
    "\udc80": "a character beyond ASCII",
    "\x1b(": "missing )",
    "(" * 1500 + ")" * 1500: "nested too deeply",
    "a" * (MAX_LENGTH + 1): f"{MAX_LENGTH + 1} characters, more than {MAX_LENGTH}",
    "(a{999}|b)" * 300: "pattern too large",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_used_is_told_in_one_line(pattern: str) -> None:
    with pytest.raises(PatternError, match=re.escape(REFUSED[pattern])) as caught:
        check_patterns(["fine", pattern])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    for ask in (matches, matches_ending):
        with pytest.raises(PatternError):
            ask(pattern, "a.b")


def test_patterns_are_limited_together() -> None:
    names = [
        f"encoder.layer.{layer}.attention.self.{part}" for layer in range(60) for part in ("query", "key", "value")
    ]
    check_patterns([*names, *names])  # a rank and an alpha for each site of a large encoder
    check_patterns([".*" * 50] * 3)
    with pytest.raises(PatternError, match="too many patterns, or too large ones"):
        check_patterns(f"(a|b|c|.{{{n}}})" for n in range(1, 400))
    with pytest.raises(PatternError, match="too many patterns"):
        check_patterns(map(str, range(10**5)))


def test_a_set_at_its_limit_does_not_hang() -> None:
    patterns = [f"([a-z.0-9]*e.?){{{count}}}!" for count in range(2, 60)]
    fitting = next(size for size in range(len(patterns), 0, -1) if _fit(patterns[:size]))
    assert 20 < fitting < len(patterns)
    with in_time():
        for layer in range(24):
            name = f"encoder.layer.{layer}.intermediate.dense"
            assert not any(matches_ending(pattern, name) for pattern in patterns[:fitting])


def _fit(patterns: list[str]) -> bool:
    with contextlib.suppress(PatternError):
        check_patterns(patterns)
        return True
    return False


@quick
@given(st.sets(NAMES, min_size=1, max_size=8), st.lists(NAMES, max_size=20))
def test_a_pattern_of_names_matches_these_and_no_others(names: set[str], others: list[str]) -> None:
    pattern = exactly(names)
    assert all(matches(pattern, name) for name in names)
    assert [name for name in others if matches(pattern, name)] == [name for name in others if name in names]


def test_names_that_differ_in_their_number_are_one_alternative() -> None:
    parts = ("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense")
    names = [f"encoder.layer.{layer}.{part}" for part in parts for layer in range(0, 48, 2)]
    assert exactly(names[:2]) == r"encoder\.layer\.(0|2)\.attention\.self\.query"
    assert exactly(["pooler.dense", "a.1.b"]) == r"pooler\.dense|a\.1\.b"
    pattern = exactly(names)
    assert len(pattern) < MAX_LENGTH / 4
    assert [name for name in (f"encoder.layer.{n}.output.dense" for n in range(50)) if matches(pattern, name)] == names[
        -24:
    ]
