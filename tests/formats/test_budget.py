"""A budget of bytes: what is merged at the rank that it allows fits, and a larger rank would not."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_bert as mb
from mergekit_bert.composing.merge_input import of_adapter, of_merged
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.errors import CompositionError
from mergekit_bert.formats.budget import ensemble_size, rank_within, within_size
from mergekit_bert.formats.file import write_model
from mergekit_bert.request import MergeRequest
from tests.composing.helpers import given, merged, trio

MIB = 2**20


def size_at(path: Path, encoder: mb.Encoder, method: str, rank: int) -> int:
    short = {"steps": 2} if METHODS.get(method).learn is not None else {}
    write_model(path, merged(trio(encoder), method, rank=rank, options=short, given=given(encoder)))
    return path.stat().st_size


@pytest.fixture(scope="module")
def ties_at(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], int]:
    """The size of a merge by ties at a rank."""
    path = tmp_path_factory.mktemp("ties") / "m"
    return functools.cache(lambda rank: size_at(path, bert, "ties", rank))


@pytest.mark.parametrize("method", METHODS.names())
def test_the_file_fits_and_a_larger_rank_tells_by_how_much(
    bert: mb.Encoder, tmp_path: Path, method: str, ties_at: Callable[[int], int]
) -> None:
    adapters, each, least = [of_adapter(one) for one in trio(bert)], ties_at(3) - ties_at(2), ties_at(1)
    for budget in (least + 2**17, least + 2**17 + 4 * each):
        rank = rank_within(adapters, budget / MIB)
        assert size_at(tmp_path / "budget", bert, method, rank) <= budget
        assert budget - ties_at(rank) < each + 2**17


def test_more_than_enough_is_no_more_than_the_narrowest_site_takes(bert: mb.Encoder) -> None:
    adapters = trio(bert)
    narrowest = min(min(shape) for one in adapters for shape in one.sites.values())
    assert rank_within([of_adapter(one) for one in adapters], 1e6) == narrowest


def test_what_no_rank_fits_into_is_told_with_what_would(bert: mb.Encoder) -> None:
    adapters = [of_adapter(one) for one in trio(bert)]
    with pytest.raises(CompositionError, match=r"`size=0\.001`: .* at least 0\.\d+, for rank 1") as error:
        rank_within(adapters, 0.001)
    assert rank_within(adapters, float(str(error.value).rsplit("=", 1)[1].strip("`"))) >= 1


def test_a_recipe_gets_the_rank_unless_something_else_decides_the_size(bert: mb.Encoder, tmp_path: Path) -> None:
    adapters = trio(bert)
    inputs = [of_adapter(one) for one in adapters]
    rank = rank_within(inputs, 0.2)
    assert within_size(Recipe("ties"), inputs, 0.2) == (Recipe("ties", rank=rank), "")
    mb.save(mb.merge(adapters, "ties", size=0.2), tmp_path / "small.safetensors")
    mb.save(mb.merge(adapters, "ties", rank=rank), tmp_path / "same.safetensors")
    assert (tmp_path / "small.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    refused = {"`rank`": Recipe(rank=2), "`private`": Recipe(private=2), "`method=": Recipe("ensemble")}
    for named, recipe in refused.items():
        with pytest.raises(CompositionError, match=f"`size`: {named}"):
            within_size(recipe, inputs, 0.2)
    with pytest.raises(CompositionError, match="`size`: `keep_inputs`"):
        mb.merge(adapters, "ties", size=0.2, keep_inputs=True)


def test_where_all_fit_side_by_side_nothing_is_merged_unless_a_merge_is_asked_for(
    bert: mb.Encoder, tmp_path: Path
) -> None:
    adapters = trio(bert)
    inputs, size = [of_adapter(one) for one in adapters], ensemble_size([of_adapter(one) for one in adapters])
    ensemble, reason = within_size(Recipe(), inputs, size)
    assert (ensemble.method, ensemble.rank) == ("ensemble", None)
    assert "fit into `size` unmerged" in reason
    model = mb.merge(adapters, size=size)
    mb.save(model, tmp_path / "all.safetensors")
    assert (tmp_path / "all.safetensors").stat().st_size == size * MIB
    asked: tuple[dict[str, Any], ...] = (
        {"search": 3},
        {"calibrate": ["heads"]},
        {"recipe": Recipe(weights={"sst": 2.0})},
    )
    for more in asked:
        found = MergeRequest(inputs, size=0.2, **more).resolved().recipe
        assert (found.method, found.rank) == ("pico", rank_within(inputs, 0.2))
    no_adapters = [of_merged(merged(adapters, "ties"))]
    assert ensemble_size(no_adapters) == float("inf")
    assert within_size(Recipe(), no_adapters, 0.2) == (Recipe(rank=rank_within(no_adapters, 0.2)), "")
