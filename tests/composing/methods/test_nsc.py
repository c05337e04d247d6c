"""NSC merging: the ratio against its definitions, and weights that lower it whatever the kind of task."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold
from mergekit_bert.composing.merge_input import of_adapter
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.composing.methods.nsc import _Watch, null_space_ratio, watched_sites
from mergekit_bert.composing.weighting import Blend, Student
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.errors import CompositionError
from tests.adapters.helpers import dense64, quick, random_adapter
from tests.composing.helpers import given, merged, trio, zeroed
from tests.tiny import tiny_rows

ROWS = 12
QUICK = {"steps": 4, "lr": 0.1, "batch_size": 6}


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert)


def learn(encoder: mb.Encoder, adapters: Sequence[Adapter], **options: object) -> mb.Merged:
    return merged(adapters, "nsc", given=given(encoder, ROWS), options={**QUICK, **options})


def ratio_by_hand(z: Tensor, a: Tensor) -> Tensor:
    """``√(1 − zᵀ Aᵀ (A Aᵀ)⁺ A z / ‖z‖²)`` (the paper's fast form) of every vector, in float64."""
    z, a = z.double(), a.double()
    seen = torch.einsum("...i,ij,...j->...", z @ a.T, torch.linalg.pinv(a @ a.T), z @ a.T)
    return (1 - seen / z.square().sum(-1)).clamp(min=0).sqrt()


def mean_ratio(encoder: mb.Encoder, model: mb.Merged | Adapter, one: Adapter, sites: Sequence[str]) -> float:
    """The mean over sites of the mean over tokens, row by row through the folded model."""
    part = model.part(one.name)
    folded = classifier(fold(encoder, part), part.task, part.head)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for site, kept in found.items():
        module = folded.encoder.get_submodule(site)
        module.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
    rows = dataclasses.replace(tiny_rows(one.task, ROWS), labels=None)
    tokens = tokenise(rows, one.task, encoder.tokenizer, one.max_length, encoder.pad_token)
    with torch.no_grad():
        for row in range(ROWS):
            outputs_of(folded, tokens.batch([row]))
    return float(
        np.mean([ratio_by_hand(torch.cat(kept), one.tensors[site]["A"]).mean() for site, kept in found.items()])
    )


def pupil_of(encoder: mb.Encoder, adapters: Sequence[Adapter], place: int, weight: float) -> Student:
    """The task of one adapter under the merge of all of them with one weight."""
    one = adapters[place]
    blend = Blend(encoder, [of_adapter(adapter) for adapter in adapters], lambda site: site, weight)
    tokens = tokenise(tiny_rows(one.task, ROWS), one.task, encoder.tokenizer, one.max_length, encoder.pad_token)
    part = one.part(one.name)
    return Student(part, blend.model(part, of_adapter(one).own[one.name]), dataclasses.replace(tokens, labels=None))


@quick
@drawn(seed=st.integers(0, 10_000), k=st.integers(1, 6), rank=st.integers(0, 6))
def test_the_ratio_is_the_papers(seed: int, k: int, rank: int) -> None:
    source = torch.Generator().manual_seed(seed)
    a = (
        torch.randn(k, min(rank, k), generator=source).double()
        @ torch.randn(min(rank, k), 6, generator=source).double()
    )
    z = torch.randn(4, 3, 6, generator=source).double()
    rows = torch.linalg.svd(a)[2][: min(rank, k)]
    found = null_space_ratio(z, rows)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    np.testing.assert_allclose(found**2, ratio_by_hand(z, a) ** 2, atol=1e-6)
    np.testing.assert_allclose(null_space_ratio(-3 * z, rows), found, atol=1e-12)


def test_the_ratio_at_its_ends() -> None:
    rows = torch.eye(4)[:2]
    z = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = null_space_ratio(z, rows)
    assert found.tolist() == [0.0, 1.0, 0.0]
    found.sum().backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


def test_the_watch_sees_every_token_of_its_own_sites(encoder: mb.Encoder) -> None:
    """In every architecture, packed or padded: the same as row by row through the folded model."""
    adapters = [random_adapter(encoder, "sst", targets="qkv"), random_adapter(encoder, "sts", start=3, targets="qkv")]
    for place, one in enumerate(adapters):
        student = pupil_of(encoder, adapters, place, 0.5)
        sites = watched_sites(student, 1.0)
        assert set(sites) == set(one.sites)
        if encoder.config.model_type == "deberta-v2":
            sites = [site for site in sites if "value" in site]  # query and key take positions too
        model = merged(adapters, "task_arithmetic", {"sst": 0.5, "sts": 0.5})
        found = _Watch(student, sites)(list(range(ROWS))).detach()
        assert float(found) == pytest.approx(mean_ratio(encoder, model, one, sites), abs=1e-5)


@pytest.mark.parametrize(("share", "layers"), [(0.0, set()), (0.25, {1}), (0.5, {1}), (0.51, {0, 1}), (1.0, {0, 1})])
def test_the_last_layers_are_watched(bert: mb.Encoder, three: list[Adapter], share: float, layers: set[int]) -> None:
    sites = watched_sites(pupil_of(bert, three, 0, 1.0), share)
    assert sites == [site for site in three[0].sites if any(f"layer.{layer}." in site for layer in layers)]


def test_what_is_learned_lowers_the_ratio_of_every_kind_of_task(bert: mb.Encoder, three: list[Adapter]) -> None:
    before, after = learn(bert, three, steps=0), learn(bert, three, steps=20)

    def total(model: mb.Merged) -> float:
        return sum(
            mean_ratio(bert, model, one, watched_sites(pupil_of(bert, three, place, 0.0), 0.25))
            for place, one in enumerate(three)
        )

    assert total(after) < total(before) - 0.02
    alone = learn(bert, [three[1]], steps=20)
    sites = watched_sites(pupil_of(bert, three, 1, 0.0), 0.25)
    start = learn(bert, [three[1]], steps=0)
    assert mean_ratio(bert, alone, three[1], sites) < mean_ratio(bert, start, three[1], sites)


def test_the_result_is_the_linear_merge_with_a_weight_for_every_site(bert: mb.Encoder, three: list[Adapter]) -> None:
    model = learn(bert, three)
    layers = {pattern.replace(r"\.", "."): weights for pattern, weights in model.trace["layers"].items()}
    deltas = {one.name: dense64(one) for one in three}
    assert layers.keys() == model.deltas.keys()
    for site, delta in model.deltas.items():
        exact = sum(weight * deltas[name][site] for name, weight in layers[site].items())
        np.testing.assert_allclose(delta.dense(), exact, atol=1e-5)
    assert len({tuple(weights.values()) for weights in layers.values()}) == len(layers)
    last = layers["encoder.layer.1.output.dense"]
    assert all(weight == pytest.approx(0.4) for weight in last.values()), "nothing that is watched comes after it"


def test_heads_are_not_asked(bert: mb.Encoder, three: list[Adapter]) -> None:
    other = [dataclasses.replace(one, head={name: -5 * value for name, value in one.head.items()}) for one in three]
    assert learn(bert, other).trace["layers"] == learn(bert, three).trace["layers"]


def test_mismatched_rows_do_worse(bert: mb.Encoder) -> None:
    """An adapter whose null space is judged on another's directions ends with a larger ratio of its own."""
    one = random_adapter(bert, "sts", seed=1)
    other = random_adapter(bert, "sts", seed=9, start=3)
    stranger = dataclasses.replace(one, tensors=other.tensors)
    sites = watched_sites(pupil_of(bert, [one], 0, 0.0), 0.25)
    right = learn(bert, [one], steps=20)
    wrong = learn(bert, [stranger], steps=20)
    crossed = merged([one], "task_arithmetic", layers=wrong.trace["layers"])
    assert mean_ratio(bert, right, one, sites) < mean_ratio(bert, crossed, one, sites)


def test_labels_are_never_read(bert: mb.Encoder, three: list[Adapter]) -> None:
    def with_labels(label: float | None) -> mb.Merged:
        def rows(name: str) -> Rows:
            found = tiny_rows(get_task(name), ROWS)
            return dataclasses.replace(found, labels=None if label is None else (label,) * ROWS)

        return merged(three, "nsc", given=MergeContext(lambda: bert, rows), options=QUICK)

    assert with_labels(float("nan")).trace == with_labels(None).trace


def test_neither_the_order_nor_the_run_counts(bert: mb.Encoder, three: list[Adapter]) -> None:
    first = learn(bert, three).trace["layers"]
    torch.manual_seed(7)
    assert learn(bert, three[::-1]).trace["layers"] == first


def test_where_nothing_can_be_learned_the_start_stays(bert: mb.Encoder, three: list[Adapter]) -> None:
    first = random_adapter(bert, "sst", targets=r".*layer\.0\.attention\.self\.query")
    probe = random_adapter(bert, "sts", kind="probe")
    model = learn(bert, [first, probe])
    assert model.weights == {"sst": pytest.approx(0.4), "sts": pytest.approx(0.4)}
    zero = learn(bert, [zeroed(one) for one in three])
    assert all(float(delta.dense().abs().max()) == 0 for delta in zero.deltas.values())
    assert zero.weights == {one.name: pytest.approx(0.4) for one in three}


def test_rows_are_needed(three: list[Adapter]) -> None:
    with pytest.raises(CompositionError, match="rows"):
        merged(three, "nsc")
