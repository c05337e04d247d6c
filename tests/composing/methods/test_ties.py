"""TIES: against loops in plain Python, against PEFT, and where PEFT is wrong."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from peft.utils.merge_utils import magnitude_prune, task_arithmetic
from peft.utils.merge_utils import ties as peft_ties

import mergekit_bert as mb
from mergekit_bert.adapters.delta import Dense, LowRank, add
from mergekit_bert.composing.entrywise import agreed, largest, portion, trimmed
from mergekit_bert.composing.spaces import SPACES
from tests.adapters.helpers import quick, random_adapter, renamed
from tests.composing.helpers import merged
from tests.composing.methods.entries import SMALL, merge, merge_all, noise, ranked, site


def by_hand(
    matrices: Sequence[Sequence[float]], weights: Sequence[float], counts: Sequence[int], election: str
) -> list[float]:
    """TIES of vectors, entry by entry."""
    voters = []
    for values, weight, count in zip(matrices, weights, counts, strict=True):
        kept = set(ranked(values)[:count])
        voters.append([weight * value if place in kept else 0.0 for place, value in enumerate(values)])
    found = []
    for column in zip(*voters, strict=True):
        total = sum(math.copysign(1, v) for v in column if v) if election == "count" else sum(column)
        winners = [v for v in column if v * total > 0]
        found.append(sum(winners) / len(winners) if winners else 0.0)
    return found


@quick
@given(
    hn.arrays(np.float32, (3, 8), elements=SMALL),
    st.tuples(*[st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])] * 3),
    st.integers(0, 8),
    st.sampled_from(["sum", "count"]),
)
def test_it_is_ties_by_hand(values: np.ndarray, weights: tuple[float, ...], kept: int, election: str) -> None:
    expected = by_hand(values.tolist(), weights, [kept] * 3, election)
    found = merge("ties", values.reshape(3, 2, 4), weights, density=kept / 8, election=election)
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("election", "total", "density"),
    [*(("sum", "total", density) for density in (0.0, 0.25, 0.5, 0.75, 1.0)), ("count", "frequency", 1.0)],
)
def test_it_is_pefts_ties_where_weights_are_alike(election: str, total: str, density: float) -> None:
    tensors = noise(3, 8, 6)
    for weight in (1.0, 0.4, -2.0):
        expected = peft_ties(tensors, torch.full((3,), weight), density, total)
        found = merge("ties", tensors, [weight] * 3, density=density, election=election)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_trimming_is_pefts_pruning(density: float) -> None:
    tensors, weights = noise(3, 8, 6), torch.tensor([1.0, -0.5, 2.0])
    count = math.ceil(portion(density, 48))
    found = task_arithmetic([trimmed(one, count) for one in tensors], weights)
    np.testing.assert_allclose(found, magnitude_prune(tensors, weights, density), atol=1e-6)


def test_weights_count_before_the_election() -> None:
    # Weighted, the second is the stronger: 1 · 3 against 4 · (−1). PEFT elects before it weights, and the loser wins.
    tensors, weights = [torch.tensor([[3.0]]), torch.tensor([[-1.0]])], [1.0, 4.0]
    assert float(peft_ties(tensors, torch.tensor(weights), 1.0)) == 3
    assert float(merge("ties", tensors, weights, density=1)) == -4


def test_a_negative_weight_turns_a_vote() -> None:
    # 1 · 1 and −1 · (−2) both pull upwards, and their mean is 1.5; unweighted they look like rivals.
    tensors, weights = [torch.tensor([[1.0]]), torch.tensor([[-2.0]])], [1.0, -1.0]
    assert float(merge("ties", tensors, weights, density=1)) == 1.5
    assert float(peft_ties(tensors, torch.tensor(weights), 1.0)) == 2


def test_an_adapter_of_weight_zero_is_not_there() -> None:
    tensors = noise(3, 4, 5)
    assert torch.equal(merge("ties", tensors, [1.0, 0.5, 0.0]), merge("ties", tensors[:2], [1.0, 0.5]))


def test_a_draw_elects_nobody() -> None:
    # A draw that always went to plus would not be turned round by turning both adapters round.
    tensors = [torch.tensor([[1.0]]), torch.tensor([[-1.0]])]
    assert float(peft_ties(tensors, torch.ones(2), 1.0)) == 1
    assert float(peft_ties([-one for one in tensors], torch.ones(2), 1.0)) == 1
    assert float(merge("ties", tensors, density=1)) == 0
    assert float(merge("ties", [[[2.0]], [[-1.0]]], density=1, election="count")) == 0


def test_rounding_decides_no_election() -> None:
    # In float64, .1 + .2 − .3 is 6e−17 in one order and 0 in another.
    values = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64).reshape(3, 1, 1)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        assert float(agreed(values[order])) == 0


def test_shares_are_the_decimal_numbers_that_were_written() -> None:
    assert int(0.29 * 100) == 28
    assert portion(0.29, 100) == 29
    assert portion(0.07, 100) == 7
    assert math.ceil(portion(1e-05, 1000)) == 1
    assert portion(1.0, 7) == Fraction(7)
    ramp = torch.arange(1.0, 101).reshape(10, 10)
    assert int(merge("ties", [ramp], density=0.29).count_nonzero()) == 29
    assert int(peft_ties([ramp], torch.ones(1), 0.29).count_nonzero()) == 28


@quick
@given(
    hn.arrays(np.float32, hn.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5), elements=SMALL), st.data()
)
def test_exactly_as_many_are_kept_and_equal_ones_in_order(values: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, values.size))
    found = largest(torch.tensor(values), count)
    assert found.shape == values.shape
    assert set(found.flatten().nonzero().flatten().tolist()) == set(ranked(values.flatten().tolist())[:count])


@pytest.mark.parametrize("matrix", [[[5.0]], [[-1.0, 2.0]], [[3.0], [3.0]]])
def test_the_largest_of_one_or_two_entries_stays(matrix: list[list[float]]) -> None:
    found = merge("ties", [matrix], density=0.01).flatten()
    values = torch.tensor(matrix).flatten()
    first = ranked(values.tolist())[0]
    assert found[first] == values[first]
    assert int(found.count_nonzero()) == 1


def test_density_zero_keeps_nothing() -> None:
    assert not merge("ties", noise(2, 3, 3), density=0).any()


def test_a_low_rank_delta_is_trimmed_as_its_matrix_is() -> None:
    B, A = noise(1, 5, 2)[0], noise(1, 2, 4, seed=1)[0]
    others = noise(2, 5, 4, seed=2)
    assert torch.equal(merge("ties", [LowRank(B, A), *others]), merge("ties", [B @ A, *others]))
    nothing = LowRank(torch.zeros(5, 0), torch.zeros(0, 4))
    assert torch.equal(merge("ties", [nothing, *others]), merge("ties", others))


@quick
@given(
    st.lists(hn.arrays(np.float32, (2, 3), elements=SMALL), min_size=1, max_size=4),
    st.integers(0, 20),
)
def test_a_whole_adapter_is_trimmed_by_one_threshold(values: list[np.ndarray], percent: int) -> None:
    density = percent / 20
    sites = [site("ties", [one], name=f"s{n}", density=density, trim="adapter") for n, one in enumerate(values)]
    found = torch.cat([one.flatten() for one in merge_all("ties", sites)])
    flat = np.concatenate([one.flatten() for one in values]).tolist()
    kept = set(ranked(flat)[: math.ceil(Fraction(percent, 20) * len(flat))])
    assert found.tolist() == [value if place in kept else 0.0 for place, value in enumerate(flat)]


def test_a_loud_site_takes_a_quiet_ones_share() -> None:
    loud, quiet = [[9.0, 8.0, 7.0, 6.0]], [[4.0, 3.0, 2.0, 1.0]]
    kept = {}
    for trim in ("tensor", "adapter"):
        sites = [site("ties", [one], name=name, density=0.5, trim=trim) for name, one in (("a", loud), ("b", quiet))]
        kept[trim] = [one.flatten().tolist() for one in merge_all("ties", sites)]
    assert kept["tensor"] == [[9, 8, 0, 0], [4, 3, 0, 0]]
    assert kept["adapter"] == [[9, 8, 7, 6], [0, 0, 0, 0]]


def test_one_adapters_threshold_is_its_own(bert: mb.Encoder) -> None:
    loud = random_adapter(bert, "sst", targets="qv", spread=3.0)
    quiet = random_adapter(bert, "sts", start=3, targets="attention")
    options = {"trim": "adapter", "density": 0.3}
    model, alone = (merged(those, "ties", options=options) for those in ([loud, quiet], [quiet]))
    own = quiet.sites.keys() - loud.sites.keys()
    assert own
    for name in own:
        assert alone.deltas[name].dense().any()
        assert torch.equal(model.deltas[name].dense(), alone.deltas[name].dense())


@pytest.mark.parametrize("space", ["full", "core", "knots"])
def test_a_whole_adapter_stays_in_every_space(bert: mb.Encoder, space: str) -> None:
    one = random_adapter(bert, "sst", targets="qv")
    model = merged([one], "ties", space=space, options={"trim": "adapter", "density": 1})
    for name, delta in one.deltas().items():
        np.testing.assert_allclose(model.deltas[name].dense(), delta.dense(), atol=1e-5)


def test_kept_entries_of_whole_adapters_are_counted_exactly(bert: mb.Encoder) -> None:
    one = random_adapter(bert, "sst")
    model = merged([one], "ties", options={"trim": "adapter", "density": 0.2})
    count = sum(delta.shape[0] * delta.shape[1] for delta in model.deltas.values())
    kept = sum(int(delta.dense().count_nonzero()) for delta in model.deltas.values())
    assert kept == math.ceil(Fraction(1, 5) * count)


def test_rounding_does_not_vote() -> None:
    # Adapters on rows that are orthogonal share no coordinate of the core, so nobody stands against anybody; counted
    # as voters, the roundings of their zeros would halve what they happen to agree with.
    rows = torch.linalg.qr(noise(1, 16, 6)[0])[0].T
    columns = [torch.linalg.qr(one)[0] for one in noise(3, 12, 2, seed=1)]
    strengths = torch.tensor([[9.0, 3.0], [7.0, 2.0], [5.0, 1.0]])
    deltas = [LowRank(columns[n] * strengths[n], rows[2 * n : 2 * n + 2]) for n in range(3)]
    inner, leave = SPACES["core"].enter(deltas)
    assert all(int((one.dense().abs() < 1e-5).sum()) > 0 for one in inner)
    found = leave(Dense(merge("ties", inner, [1.0, -0.5, 2.0], density=1)))
    exact = add([one.scaled(weight) for one, weight in zip(deltas, (1.0, -0.5, 2.0), strict=True)])
    np.testing.assert_allclose(found.dense(), exact.dense(), atol=1e-4)


@pytest.mark.parametrize("election", ["sum", "count"])
def test_rounding_counts_for_nobody_but_alone(election: str) -> None:
    one, two, three = [[3.0, -2.0, 1e-7]], [[1e-7, 1e-7, 4.0]], [[1.0, 2.0, 1e-7]]
    found = merge("ties", [one, two, three], density=1, election=election)
    np.testing.assert_allclose(found, [[2, 0, 4]], atol=1e-6)
    assert torch.equal(merge("ties", [one], density=1, election=election), torch.tensor(one))
    assert not merge("ties", [torch.zeros(2, 2)] * 2, density=1, election=election).any()


def test_adapters_without_sites_are_merged(bert: mb.Encoder) -> None:
    bare = [renamed(random_adapter(bert, "sst", kind="probe"), name) for name in ("a", "b")]
    assert not merged(bare, "ties", options={"trim": "adapter"}).deltas
