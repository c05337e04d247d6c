"""A method within a method: which may be one, and what it is given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from mergekit_bert.adapters.delta import Delta
from mergekit_bert.composing import within
from mergekit_bert.composing.method import METHODS, Method, Site
from mergekit_bert.composing.methods import ctm, pico
from mergekit_bert.composing.spaces import Leave
from mergekit_bert.composing.within import INNER, merge_within, survey_within
from tests.composing.methods.sites import low_rank, zero


@pytest.mark.parametrize("name", INNER)
def test_an_inner_method_needs_nothing_but_deltas_and_is_no_frame(name: str) -> None:
    record = METHODS.get(name)
    assert record.needs == ()
    assert record.learn is None
    assert "inner" not in record.options.__dataclass_fields__


@dataclass(frozen=True)
class Frame:
    inner: str = "seeing"


@dataclass(frozen=True)
class TaskSpecific:
    number: int = 3


def _sum(site: Site) -> Delta:
    assert site.options == TaskSpecific()
    assert site.survey == ["layer"]
    return within.METHODS.get("task_arithmetic").merge(site)


def _surveyed(sites: Sequence[Site]) -> list[str]:
    for site in sites:
        assert site.options == TaskSpecific()
        assert site.names == ["b", "d"]
        assert site.weights == [3.0, -1.0]
    return [site.name for site in sites]


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that looks at what it is given."""
    record = Method("seeing", "x", "x", "x", merge=_sum, options=TaskSpecific, survey=_surveyed)
    found = METHODS.get
    monkeypatch.setattr(METHODS, "get", lambda name: record if name == "seeing" else found(name))


def _doubled(site: Site) -> tuple[Site, Leave]:
    return replace(site, deltas=[delta.scaled(2.0) for delta in site.deltas]), lambda merged: merged.scaled(10.0)


@pytest.mark.usefixtures("seeing")
def test_it_is_given_what_is_not_zero_with_its_own_options_and_survey() -> None:
    deltas: list[Any] = [zero(), low_rank(0, 2), low_rank(1, 2), low_rank(2, 1)]
    site = Site("layer", ["a", "b", "c", "d"], deltas, [1.0, 3.0, 0.0, -1.0], Frame())
    empty = Site("empty", ["a"], [zero()], [1.0], Frame())
    survey = survey_within([site, empty], _doubled)
    assert survey == ["layer"]
    found = merge_within(replace(site, survey=survey), _doubled).dense()
    torch.testing.assert_close(found, 20 * (3 * deltas[1].dense() - deltas[3].dense()), atol=1e-4, rtol=1e-4)
    assert torch.equal(merge_within(empty, _doubled).dense(), torch.zeros(9, 7))


def test_a_survey_is_asked_for_only_where_the_inner_method_has_one() -> None:
    def never(site: Site) -> tuple[Site, Leave]:
        raise AssertionError("nobody looks")

    site = Site("layer", ["a"], [low_rank(0, 2)], [1.0], pico.Options(inner="tsv"))
    assert survey_within([site], never) is None
    assert survey_within([], never) is None


@pytest.mark.parametrize("record", [ctm.RECORD, pico.RECORD])
def test_frames_pass_the_survey_on(record: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Site] = []
    spy = replace(METHODS.get("tsv"), survey=seen.extend)
    found = METHODS.get
    monkeypatch.setattr(METHODS, "get", lambda name: spy if name == "tsv" else found(name))
    site = Site("layer", ["a", "b"], [low_rank(0, 2), low_rank(1, 2)], [1.0, 1.0], record.options(inner="tsv"))
    assert record.survey is not None
    record.survey([site, replace(site, name="other")])
    assert [one.name for one in seen] == ["layer", "other"]
    assert not torch.allclose(seen[0].deltas[0].dense()[:1, :1].double(), site.deltas[0].dense()[:1, :1].double())
