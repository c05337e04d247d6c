"""The recommendation, by what is given: each line of the docs' table."""

import dataclasses

import pytest

import mergekit_bert as mb
from mergekit_bert.composing.merge_input import MergeInput, of_adapter
from mergekit_bert.composing.recommendation import recommend
from tests.composing.helpers import trio

GRAM = {"gram": {"some.site": {}}}


def inputs(bert: mb.Encoder, basis: str, gram: bool) -> list[MergeInput]:
    found = [of_adapter(one) for one in trio(bert)]
    seeds = {"one": (0, 0, 0), "several": (0, 0, 1), "none": (None, None, None)}[basis]
    for place, seed in enumerate(seeds):
        rows = found[place].basis
        assert rows is not None
        own = None if seed is None else dataclasses.replace(rows, seed=seed)
        found[place] = dataclasses.replace(found[place], basis=own, statistics=GRAM if gram else {})
    return found


@pytest.mark.parametrize(
    ("basis", "gram", "rows", "synthetic", "searched", "method"),
    [
        ("one", False, True, False, False, "distill"),
        ("none", True, True, False, False, "distill"),
        ("one", True, True, True, False, "distill"),
        ("none", False, True, True, False, "pico"),
        ("several", False, True, True, False, "pico"),
        ("one", True, False, False, False, "regmean"),
        ("none", True, False, False, False, "pico"),
        ("one", False, False, False, False, "pico"),
        ("one", True, True, False, True, "regmean"),
        ("one", False, True, False, True, "pico"),
    ],
)
def test_it_follows_what_is_given(
    bert: mb.Encoder, basis: str, gram: bool, rows: bool, synthetic: bool, searched: bool, method: str
) -> None:
    found, reason = recommend(inputs(bert, basis, gram), rows, synthetic=synthetic, searched=searched)
    assert found == method
    if not rows:
        assert "there are rows" not in reason
    assert ("synthetic" in reason) == (synthetic or (not rows and not searched and found == "pico"))
