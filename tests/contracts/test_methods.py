"""What every registered merge method keeps to in every space it is defined in, and some of them for every family."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Delta, Dense, LowRank
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.adapters.patch import check_part
from mergekit_bert.composing.merge_input import of_adapter
from mergekit_bert.composing.method import METHODS, NEEDS, Method, Site, make_options
from mergekit_bert.composing.reference import example, method_page, method_row
from mergekit_bert.composing.spaces import SPACES
from mergekit_bert.errors import BasisError, CompositionError, UnknownNameError
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import random_adapter, same_adapter, same_tensors
from tests.composing.helpers import ONE, given, merged, trio, zeroed
from tests.tiny import tiny_rows

TOLERANCE = 1e-6
PAIRS = [(method.name, space) for method in METHODS for space in method.spaces]
ALONE = [
    (name, space)
    for name, space in PAIRS
    if METHODS.get(name).learn is None and METHODS.get(name).survey is None and not METHODS.get(name).needs
]
"""Where what is done at a site depends on nothing else."""
BY_ITSELF = [
    (name, space)
    for name, space in PAIRS
    if METHODS.get(name).learn is None and not {"gram", "fisher"} & set(METHODS.get(name).needs)
]
"""Where one site and its Deltas are all that is needed."""
ONE_OF_EACH = ("task_arithmetic", "ties", "tsv", "regmean", "distill")
"""A linear method, one on entries, one by decomposition, one with statistics and one that learns.

What a family brings into a merge meets nothing else in other methods: these merge every family, and all merge LoRA.
"""
ANY_BASIS = [(name, space) for name, space in PAIRS if "basis" not in METHODS.get(name).needs]


@pytest.fixture(params=METHODS.names())
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS.get(request.param)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Method, str]:
    name, space = request.param
    return METHODS.get(name), space


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv", train_bias=True)


def blend(
    pair: tuple[Method, str],
    encoder: mb.Encoder,
    adapters: Sequence[Adapter],
    weights: dict[str, float] | None = None,
    rank: int | None = None,
    **options: Any,
) -> mb.Merged:
    """A merge by a method in a space; one that learns takes two steps on a few rows."""
    method, space = pair
    known = {one.name for one in dataclasses.fields(method.options)}
    few = {"steps": 2} if "steps" in known and "steps" not in options else {}
    rows = given(encoder) if set(method.needs) - {"basis"} else None
    return merged(adapters, method.name, weights, space=space, options={**few, **options}, rank=rank, given=rows)


def close(one: mb.Merged, two: mb.Merged, tolerance: float = TOLERANCE, factor: float = 1.0) -> None:
    """Check that the first merge is the second times ``factor``."""
    assert one.deltas.keys() == two.deltas.keys()
    assert one.shifts.keys() == two.shifts.keys()
    for site in one.deltas:
        exact = factor * two.deltas[site].dense()
        atol = tolerance * max(1.0, float(exact.abs().max()))
        np.testing.assert_allclose(one.deltas[site].dense(), exact, atol=atol)
    for name in one.shifts:
        np.testing.assert_allclose(one.shifts[name], factor * two.shifts[name], atol=tolerance)


def test_it_is_a_frozen_record_that_explains_itself(method: Method) -> None:
    for text in (method.description, method.formula, method.source, method.default_weights):
        assert text
    assert set(method.needs) <= set(NEEDS)
    assert method.spaces
    assert set(method.spaces) <= set(SPACES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]
    page = method_page(method)
    for text in (method.name, method.formula, method.source, example(method, ("sst", "para", "sts"))):
        assert text in page
    assert method_row(method)[0] == method.name


def test_every_option_says_what_it_is_and_keeps_its_range(method: Method) -> None:
    kinds = get_type_hints(method.options)
    for one in dataclasses.fields(method.options):
        assert one.metadata["help"]
        assert make_options(method, {one.name: str(one.default)}) == method.options(), "its default is a value it takes"
        low, high = one.metadata["low"], one.metadata["high"]
        outside: list[Any] = [bound + sign for bound, sign in ((low, -1), (high, 1)) if bound is not None]
        wrong = ["much", *outside, *([math.nan, math.inf] if kinds[one.name] is float else [])]
        if kinds[one.name] is str:
            assert one.metadata["choices"], "a text is one of a list"
            wrong = ["much", 3]
        for value in wrong:
            with pytest.raises(CompositionError, match=f"option '{one.name}' of {method.name}: "):
                make_options(method, {one.name: value})
    with pytest.raises((UnknownNameError, CompositionError), match=r"expected (one of|no options)"):
        make_options(method, {"no_such": 1})


def test_its_own_weights_are_one_finite_number_for_each(method: Method, three: list[Adapter]) -> None:
    for count in (1, 2, 3):
        weights = method.weights([of_adapter(one) for one in three[:count]])
        assert len(weights) == count
        assert all(math.isfinite(weight) for weight in weights)


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_one_adapter_stays_itself_times_its_weight(pair: tuple[Method, str], bert: mb.Encoder, weight: float) -> None:
    _stays_itself(pair, bert, "lora", weight)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("kind", FAMILIES.names())
def test_one_adapter_of_any_family_stays_itself_times_its_weight(bert: mb.Encoder, name: str, kind: str) -> None:
    _stays_itself((METHODS.get(name), "full"), bert, kind, -2.0)


def _stays_itself(pair: tuple[Method, str], bert: mb.Encoder, kind: str, weight: float) -> None:
    one = random_adapter(bert, "sst", kind=kind, targets="qv", train_layernorm=True)
    if "basis" in pair[0].needs and one.sites and one.basis is None:
        with pytest.raises(BasisError, match="sst trained without an orthogonal basis"):
            blend(pair, bert, [one], {"sst": weight})
        return
    if pair[0].one_stays is None:
        model = blend(pair, bert, [one], {"sst": weight})
        assert model.deltas.keys() == of_adapter(one).deltas.keys()
        return
    every = bert.config.hidden_size if one.family.needs_weight and pair[0].learn else None  # it learns factors
    model = blend(pair, bert, [one], {"sst": weight}, rank=every, **pair[0].one_stays)
    part = model.part("sst")
    assert part.deltas.keys() == one.deltas().keys()
    for site, delta in one.deltas().items():
        exact = (1 if site.startswith("pooler") else weight) * delta.dense()
        np.testing.assert_allclose(part.deltas[site].dense(), exact, atol=5e-6 * float(exact.abs().max()))
    kept = {name: (1 if name.startswith("pooler") else weight) * shift for name, shift in one.shifts.items()}
    assert same_tensors(part.shifts, kept)
    assert same_tensors(model.own["sst"].head, one.head)
    assert part.extras.keys() == one.extras.keys()
    assert all(same_tensors(part.extras[name], values) for name, values in one.extras.items())


def test_adapters_of_different_families_merge(method: Method, bert: mb.Encoder) -> None:
    """Sites in factors, dense ones, and shifts alone; what one of them lacks is no change."""
    adapters = [
        random_adapter(bert, task, kind=kind, targets="qv", rank=rank)
        for task, kind, rank in (("sst", "lora", 3), ("para", "loha", 8), ("sts", "bitfit+layernorm", 3))
    ]
    if "basis" in method.needs:
        with pytest.raises(BasisError, match="para trained without an orthogonal basis"):
            blend((method, "full"), bert, adapters)
        return
    model = blend((method, method.spaces[0]), bert, adapters, rank=bert.config.hidden_size)
    assert model.deltas.keys() == adapters[0].deltas().keys() == adapters[1].deltas().keys()
    assert all(bool(delta.dense().isfinite().all()) for delta in model.deltas.values())
    shift = next(name for name in adapters[2].shifts if not name.startswith("pooler"))
    scale = float((model.part("sts").shifts[shift] / adapters[2].shifts[shift])[0])
    np.testing.assert_allclose(model.part("sst").shifts[shift], scale * adapters[2].shifts[shift], rtol=1e-5)


def test_the_order_of_the_adapters_does_not_matter(
    pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]
) -> None:
    if pair[0].order_matters:
        assert "order" in pair[0].description
        return
    weights = {"sst": 0.5, "sts": 1.5, "para": 0.25}
    first = blend(pair, bert, three, weights)
    for order in list(itertools.permutations(three))[1::2]:
        again = blend(pair, bert, order, weights)
        close(again, first, 1e-4)
        assert [task.name for task in again.tasks] == [one.name for one in order]


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_weights_times_a_number_give_the_result_times_it(
    pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter], factor: float
) -> None:
    if pair[0].name == "distill":  # its weights are where it starts to learn
        factor = 1.0
    weights = {"sst": 0.5, "sts": 1.5, "para": 0.25}
    scaled = {name: factor * weight for name, weight in weights.items()}
    close(blend(pair, bert, three, scaled), blend(pair, bert, three, weights), 2e-5, factor)


def test_the_same_adapters_give_the_same_bits(pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]) -> None:
    torch.manual_seed(1)
    one = blend(pair, bert, three)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = blend(pair, bert, three)
    assert all(torch.equal(one.deltas[site].dense(), two.deltas[site].dense()) for site in one.deltas)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_matters_to_those_that_draw_and_to_no_other(method: Method, bert: mb.Encoder) -> None:
    adapters = trio(bert, targets="qv")
    rows = given(bert, 40) if set(method.needs) - {"basis"} else None
    few = {"steps": 2, "batch_size": 4} if "steps" in {one.name for one in dataclasses.fields(method.options)} else {}
    one, two = (merged(adapters, method.name, seed=seed, options=few, given=rows) for seed in (0, 1))
    same = all(torch.equal(one.deltas[site].dense(), two.deltas[site].dense()) for site in one.deltas)
    assert same != method.random


def test_it_leaves_its_inputs_alone(pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]) -> None:
    kept = copy.deepcopy(three)
    blend(pair, bert, three)
    assert all(same_adapter(*pair) for pair in zip(three, kept, strict=True))


def test_every_head_is_kept(pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]) -> None:
    model = blend(pair, bert, three)
    assert [task.outputs for task in model.tasks] == [5, 1, 2]
    for one in three:
        assert same_tensors(model.own[one.name].head, one.head)


def _uneven(bert: mb.Encoder) -> Sequence[Adapter]:
    return [
        random_adapter(bert, "sst", rank=2, targets="qv"),
        random_adapter(bert, "sts", rank=7, start=2, targets="attention", alpha=9.0),
        random_adapter(bert, "para", rank=1, start=9, targets=r".*\.output\.dense"),
    ]


def test_ranks_and_targets_may_differ(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    adapters = _uneven(bert)
    model = blend(pair, bert, adapters)
    sites = {site: size for one in adapters for site, size in one.sites.items()}
    assert {site: delta.shape for site, delta in model.deltas.items()} == sites
    for one in adapters:
        check_part(one.name, model.part(one.name), bert)
    for delta in model.deltas.values():
        assert delta.dense().dtype == torch.float32
        assert delta.dense().isfinite().all()


@pytest.mark.parametrize("pair", ALONE, ids="-".join, indirect=True)
def test_a_site_of_one_adapter_alone_is_as_in_a_merge_of_it_alone(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    adapters = [random_adapter(bert, "sst", targets=ONE), random_adapter(bert, "sts", start=3, targets="qv")]
    weights = {"sst": 0.5, "sts": 1.0}
    model = blend(pair, bert, adapters, weights)
    for one in adapters:
        alone = blend(pair, bert, [one], {one.name: weights[one.name]})
        for site, delta in alone.deltas.items():
            np.testing.assert_allclose(model.deltas[site].dense(), delta.dense(), atol=1e-5)


def test_zero_adapters_merge_to_zero(pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]) -> None:
    none = {"steps": 0} if "steps" in {one.name for one in dataclasses.fields(pair[0].options)} else {}
    model = blend(pair, bert, [zeroed(one) for one in three], **none)
    for delta in model.deltas.values():
        assert torch.equal(delta.dense(), torch.zeros(delta.shape))
    assert all(torch.equal(shift, torch.zeros_like(shift)) for shift in model.shifts.values())


def test_a_zero_adapter_beside_another_is_no_error(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    adapters = trio(bert, targets="qv")[:2]
    model = blend(pair, bert, [adapters[0], zeroed(adapters[1])])
    assert all(delta.dense().isfinite().all() for delta in model.deltas.values())


@pytest.mark.parametrize("pair", ANY_BASIS, ids="-".join, indirect=True)
def test_factors_in_bfloat16_are_merged_in_float32(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    def cast(one: Adapter, dtype: torch.dtype) -> Adapter:
        tensors = {site: {name: t.bfloat16().to(dtype) for name, t in own.items()} for site, own in one.tensors.items()}
        return dataclasses.replace(one, tensors=tensors, basis=None)

    adapters = trio(bert, targets="qv", basis="orthogonal")
    half = blend(pair, bert, [cast(one, torch.bfloat16) for one in adapters])
    whole = blend(pair, bert, [cast(one, torch.float32) for one in adapters])
    for site, delta in half.deltas.items():
        assert delta.dense().dtype == torch.float32
        exact = whole.deltas[site].dense()
        np.testing.assert_allclose(delta.dense(), exact, atol=1e-6 * float(exact.abs().max()))


def test_a_delta_of_less_rank_than_its_factors_is_merged(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    def doubled(one: Adapter) -> Adapter:
        tensors = {site: {**own, "B": own["B"][:, :1].repeat(1, 3)} for site, own in one.tensors.items()}
        return dataclasses.replace(one, tensors=tensors)

    model = blend(pair, bert, [doubled(one) for one in trio(bert, targets="qv")])
    for delta in model.deltas.values():
        assert delta.dense().isfinite().all()
        assert int(torch.linalg.matrix_rank(delta.dense().double(), rtol=1e-5)) <= (
            3 if isinstance(delta, LowRank) and pair[0].learn is None else min(delta.shape)
        )


def test_values_that_are_not_finite_are_refused(pair: tuple[Method, str], bert: mb.Encoder) -> None:
    adapters = trio(bert, targets="qv")
    site = next(iter(adapters[1].tensors))
    adapters[1].tensors[site]["B"][0, 0] = math.nan
    with pytest.raises(CompositionError, match=f"site '{site}' of 'sts': NaN or values beyond"):
        blend(pair, bert, adapters)


def _one_site(method: Method, deltas: Sequence[Delta], space: str) -> Delta:
    """The merged Delta of a site that stands alone, under the options that leave one adapter as it is."""
    inner, leave = SPACES[space].enter(deltas)
    names = [f"t{n}" for n in range(len(deltas))]
    site = Site("site", names, inner, [1.0] * len(deltas), make_options(method, dict(method.one_stays or {})))
    survey = method.survey([site]) if method.survey is not None else None
    return leave(method.merge(dataclasses.replace(site, survey=survey)))


@pytest.mark.parametrize("pair", BY_ITSELF, ids="-".join, indirect=True)
def test_a_site_of_one_or_two_entries_is_merged(pair: tuple[Method, str]) -> None:
    for shape, count in itertools.product([(1, 1), (1, 2), (2, 1)], (1, 2)):
        low = LowRank(torch.full((shape[0], 1), 2.0), torch.full((1, shape[1]), 3.0))
        found = _one_site(pair[0], [low, Dense(torch.ones(shape))][:count], pair[1])
        assert found.shape == shape
        assert found.dense().isfinite().all()
        if count == 1 and pair[0].one_stays is not None:
            np.testing.assert_allclose(found.dense(), torch.full(shape, 6.0), rtol=1e-5)


@pytest.mark.parametrize("pair", BY_ITSELF, ids="-".join, indirect=True)
def test_dense_deltas_are_merged_as_their_factors_are(pair: tuple[Method, str], three: list[Adapter]) -> None:
    site = next(iter(three[0].sites))
    factors = [one.deltas()[site] for one in three]
    low = _one_site(pair[0], factors, pair[1])
    full = _one_site(pair[0], [Dense(one.dense()) for one in factors], pair[1])
    np.testing.assert_allclose(low.dense(), full.dense(), atol=2e-5)


def test_the_merged_file_gives_the_model_back(pair: tuple[Method, str], bert: mb.Encoder, tmp_path: Path) -> None:
    model = blend(pair, bert, _uneven(bert))
    write_model(tmp_path / "x", model)
    again = read_model(tmp_path / "x")
    assert isinstance(again, mb.Merged)
    close(again, model, 0)
    assert again.weights == model.weights
    assert again.recipe == model.recipe
    write_model(tmp_path / "y", again)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()
    once_more = merged([again], "task_arithmetic", {"+".join(again.parts): 1.0})  # type: ignore[list-item]
    close(once_more, again, 1e-6)
    assert [task.name for task in once_more.tasks] == [task.name for task in again.tasks]


def test_every_task_is_answered(pair: tuple[Method, str], bert: mb.Encoder, three: list[Adapter]) -> None:
    predictor = Predictor(blend(pair, bert, three), bert)
    for one in three:
        outputs = predictor.outputs(one.name, tiny_rows(one.task, 6))
        assert outputs.shape == (6, one.task.outputs)
        assert np.isfinite(outputs).all()
        assert outputs.std() > 0


def test_what_it_needs_is_told_before_any_work(method: Method, three: list[Adapter]) -> None:
    needs = [need for need in method.needs if need != "basis"]
    if not needs:
        assert merged(three, method.name).tasks
        return
    with pytest.raises(CompositionError, match=f"method {method.name}: {needs[0]} of .*`data`"):
        merged(three, method.name)
