"""The doctor: numbers against brute force and direct forward passes, and invariants that break when they should."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

import mergekit_bert as mb
from mergekit_bert import api
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.delta import Delta, Dense, LowRank
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.adapters.ledger import Ledger
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.composing import spaces, weighting
from mergekit_bert.composing.merge_input import MergeInput, inputs_of, of_adapter
from mergekit_bert.composing.method import METHODS, Learned, LearningContext, Site
from mergekit_bert.composing.methods import distill, orthoada, ties
from mergekit_bert.data.kind import KINDS, kind_of
from mergekit_bert.errors import CompositionError, DataError, ModelFileError
from mergekit_bert.evaluation import invariants
from mergekit_bert.evaluation.doctor import (
    MATRICES,
    Diagnosis,
    Report,
    hints,
    measure_pairs,
    to_json,
    verdicts,
)
from mergekit_bert.evaluation.invariants import Invariants, check_invariants, one_of_each_kind
from mergekit_bert.evaluation.pictures import pairs_picture, write_picture
from mergekit_bert.evaluation.tables import as_text, invariant_table, pair_table, verdict_table
from mergekit_bert.models.composition import Merged
from tests.adapters.helpers import dense64, quick, random_adapter, renamed
from tests.composing.helpers import ONE, merged, trio, zeroed
from tests.composing.helpers import given as some_rows
from tests.corpus import write_corpus
from tests.tiny import tiny_rows

EVERY = tuple(MATRICES)
CLASSIFY, REGRESS = KINDS.get("classify"), KINDS.get("regress")


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv", train_bias=True)


@pytest.fixture(scope="module")
def loose(bert: mb.Encoder) -> list[Adapter]:
    """Of unequal ranks and targets, on no common basis."""
    return [
        random_adapter(bert, "sst", rank=2, targets="qv", basis="random"),
        random_adapter(bert, "sts", rank=7, seed=1, targets="attention", basis="random", alpha=9.0),
        random_adapter(bert, "para", rank=1, seed=2, targets=r".*\.(query|output\.dense)", basis="random"),
    ]


def inputs(adapters: list[Adapter]) -> list[MergeInput]:
    return [of_adapter(one) for one in adapters]


def whole(adapter: Adapter, sites: dict[str, tuple[int, int]]) -> torch.Tensor:
    """All Deltas as one block-diagonal matrix: what numbers over several sites are numbers of."""
    dense = dense64(adapter)
    return torch.block_diag(*(dense.get(site, torch.zeros(size).double()) for site, size in sites.items()))


def test_the_geometry_is_that_of_the_dense_deltas(loose: list[Adapter]) -> None:
    found = measure_pairs(inputs(loose)).matrices
    sites = {site: size for one in loose for site, size in one.sites.items() if not site.startswith("pooler")}
    dense = [whole(one, sites) for one in loose]
    norm = torch.linalg.matrix_norm
    for i, one in enumerate(dense):
        for j, two in enumerate(dense):
            expected = {
                "inputs": norm(one @ two.T) / (norm(one @ one.T) * norm(two @ two.T)).sqrt(),
                "outputs": norm(one.T @ two) / (norm(one.T @ one) * norm(two.T @ two)).sqrt(),
                "cosine": (one * two).sum() / (norm(one) * norm(two)),
                "norms": norm(one) / norm(two),
            }
            for name, value in expected.items():
                assert found[name][i, j] == pytest.approx(float(value), abs=1e-6), (name, i, j)


@settings(quick, max_examples=20)
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.1, -3.0]), rank=st.integers(1, 5))
def test_numbers_know_bounds_symmetry_and_scale(bert: mb.Encoder, seed: int, scale: float, rank: int) -> None:
    one = random_adapter(bert, "sst", seed=seed, targets=ONE, basis="random")
    two = random_adapter(bert, "sts", seed=seed + 1, rank=rank, targets=ONE, basis="random")
    first, second = inputs([one, two])
    larger = dataclasses.replace(second, deltas={site: delta.scaled(scale) for site, delta in second.deltas.items()})
    plain, scaled = measure_pairs([first, second]).matrices, measure_pairs([first, larger]).matrices
    for name in ("inputs", "outputs", "cosine", "signs"):
        np.testing.assert_allclose(plain[name], plain[name].T, atol=1e-12)
        assert np.abs(plain[name]).max() <= 1 + 1e-9
    for name in ("inputs", "outputs"):
        np.testing.assert_allclose(scaled[name], plain[name], atol=1e-6)
        np.testing.assert_allclose(np.diag(plain[name]), 1, atol=1e-9)
    sign = np.sign(scale)
    assert scaled["cosine"][0, 1] == pytest.approx(sign * plain["cosine"][0, 1], abs=1e-6)
    assert scaled["norms"][1, 0] == pytest.approx(abs(scale) * plain["norms"][1, 0], rel=1e-5)
    assert scaled["signs"][0, 1] == pytest.approx(plain["signs"][0, 1] if sign > 0 else 1 - plain["signs"][0, 1])


def test_equal_directions_give_the_cosines_of_the_principal_angles(bert: mb.Encoder) -> None:
    source = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(32, 4, generator=source).double())[0] for _ in range(2))
    model = inputs([random_adapter(bert, "sst", targets=ONE), random_adapter(bert, "sts", start=3, targets=ONE)])
    unit = torch.linalg.qr(torch.randn(32, 4, generator=source).double())[0]
    pair = [dataclasses.replace(one, deltas={ONE: LowRank(unit, basis.T)})
            for one, basis in zip(model, (left, right), strict=True)]  # fmt: skip
    angles = torch.linalg.svdvals(left.T @ right)
    found = measure_pairs(pair).matrices
    assert found["inputs"][0, 1] == pytest.approx(float(angles.square().mean().sqrt()))
    assert found["outputs"][0, 1] == pytest.approx(1)


def test_angles_weigh_every_direction_the_same(loose: list[Adapter]) -> None:
    """Against scipy's principal angles of the dense block-diagonal matrices, whatever the singular values are."""
    found = measure_pairs(inputs(loose)).matrices
    sites = {site: size for one in loose for site, size in one.sites.items() if not site.startswith("pooler")}
    dense = [whole(one, sites).numpy() for one in loose]
    for i, one in enumerate(dense):
        for j, two in enumerate(dense):
            for name, left, right in (("input_space", one.T, two.T), ("output_space", one, two)):
                bases = [linalg.orth(side, rcond=1e-6) for side in (left, right)]
                cosines = np.cos(linalg.subspace_angles(*bases))
                assert found[name][i, j] == pytest.approx(float(np.square(cosines).mean()), abs=1e-6), (name, i, j)


def test_a_stronger_direction_changes_the_overlap_and_no_angle(bert: mb.Encoder) -> None:
    source = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(32, 4, generator=source).double())[0].T
    model = inputs([random_adapter(bert, "sst", targets=ONE), random_adapter(bert, "sts", start=3, targets=ONE)])

    def pair(strength: float) -> dict[str, Any]:
        """They share the first of two directions."""
        one, two = basis[[0, 1]] * torch.tensor([[strength], [1.0]]), basis[[0, 2]]
        made = [LowRank(torch.eye(32, 2).double(), rows.double()) for rows in (one, two)]
        pair = [dataclasses.replace(x, deltas={ONE: y}) for x, y in zip(model, made, strict=True)]
        return measure_pairs(pair).matrices  # type: ignore[return-value]

    weak, strong = pair(1.0), pair(10.0)
    assert weak["input_space"][0, 1] == pytest.approx(0.5)
    assert strong["input_space"][0, 1] == pytest.approx(0.5)
    assert strong["output_space"][0, 1] == pytest.approx(1.0)
    assert strong["inputs"][0, 1] > weak["inputs"][0, 1] + 0.1


def test_dense_deltas_have_the_numbers_of_their_factors(loose: list[Adapter]) -> None:
    low = inputs(loose)
    full = [dataclasses.replace(one, deltas={site: Dense(delta.dense()) for site, delta in one.deltas.items()})
            for one in low]  # fmt: skip
    one, two = measure_pairs(low).matrices, measure_pairs(full).matrices
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)


def test_signs_are_counted_entry_by_entry(loose: list[Adapter]) -> None:
    pair = loose[:2]
    sites = one_of_each_kind(inputs(pair))
    dense = [dense64(one) for one in pair]
    energy, against = [0.0, 0.0], [0.0, 0.0]
    for place in range(2):
        for site in sites:
            if site not in dense[place]:
                continue
            energy[place] += float(dense[place][site].square().sum())
            if site not in dense[1 - place]:
                continue
            flat, other = dense[place][site].flatten().tolist(), dense[1 - place][site].flatten().tolist()
            against[place] += sum(a * a for a, b in zip(flat, other, strict=True) if a * b < 0)
    expected = (against[0] / energy[0] + against[1] / energy[1]) / 2
    assert 0.05 < expected < 0.95
    assert measure_pairs(inputs(pair)).matrices["signs"][0, 1] == pytest.approx(expected, rel=1e-4)


def test_a_basis_is_compared_by_its_rows_and_its_room_counted(bert: mb.Encoder, tmp_path: Path) -> None:
    def adapter(task: str, start: int, rank: int, seed: int = 0) -> MergeInput:
        one = of_adapter(random_adapter(bert, task, rank=rank, start=start, targets="qv"))
        return dataclasses.replace(one, basis=BasisRows(seed, start, rank))

    four = [adapter("sst", 0, 4), adapter("sts", 3, 2), adapter("para", 20, 4)]
    report = measure_pairs(four)
    np.testing.assert_allclose(report.matrices["basis"], [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    assert report.capacity == (20 - 5) // 4 + (32 - 24) // 4
    ledger = Ledger(tmp_path)
    for holder in ("a", "b", "c", "d"):
        ledger.take(four[0].base.fingerprint, holder, 6, 32)
    assert measure_pairs(four, ledger=ledger).capacity == (32 - 24) // 4
    other = measure_pairs([four[0], adapter("sts", 3, 2, seed=1)])
    assert math.isnan(other.matrices["basis"][0, 1])
    assert other.capacity is None
    assert measure_pairs([four[0], dataclasses.replace(four[1], basis=None)]).capacity is None


def test_adapters_of_one_basis_share_no_input(three: list[Adapter]) -> None:
    report = measure_pairs(inputs(three))
    off = ~np.eye(3, dtype=bool)
    assert report.matrices["basis"][off].max() == 0
    assert report.matrices["inputs"][off].max() < 1e-6
    assert report.matrices["outputs"][off].min() > 0.05
    assert not any("basis" in hint for hint in hints(report))


def features(encoder: mb.Encoder, deltas: dict[str, torch.Tensor], task: str, count: int) -> torch.Tensor:
    """First tokens of the last layer, row by row, of the encoder with dense Deltas added."""
    changed = fold(encoder, Patch({site: Dense(delta.float()) for site, delta in deltas.items()}))
    found = []
    for texts in tiny_rows(mb.get_task(task), count).texts:
        given = encoder.tokenizer(*texts, return_tensors="pt")
        with torch.no_grad():
            found.append(changed.model(**given).last_hidden_state[0, 0])
    return torch.stack(found).double()


def test_interference_is_how_far_features_move(bert: mb.Encoder) -> None:
    adapters = trio(bert, targets="qv")
    report = measure_pairs(inputs(adapters), some_rows(bert, 6))
    dense = [dense64(one) for one in adapters]
    sites = [site for site in dense[0] if not site.startswith("pooler")]

    def moved(of: int, places: list[int]) -> float:
        name = adapters[of].name
        alone = features(bert, {site: dense[of][site] for site in sites}, name, 6)
        beside = features(bert, {site: sum(dense[p][site] for p in places) for site in sites}, name, 6)  # type: ignore[misc]
        return float((beside - alone).square().sum(1).mean() / alone.var(0, correction=0).sum())

    for i in range(3):
        assert report.matrices["interference"][i, i] == 0
        for j in range(3):
            if i != j:
                assert report.matrices["interference"][i, j] == pytest.approx(moved(i, [i, j]), rel=1e-3)


def answers_moved(encoder: mb.Encoder, own: Sequence[Adapter], others: Sequence[Adapter], task: str) -> float:
    """How far ``others`` added to the plain sum of ``own`` move the outputs for ``task``, read by a predictor."""
    rows = tiny_rows(mb.get_task(task), 6)

    def outputs(some: Sequence[Adapter]) -> np.ndarray:
        model = merged(some, "task_arithmetic", {one.name: 1.0 for one in some})
        return mb.Predictor(model, encoder).outputs(task, rows).astype(np.float64)

    alone = outputs(own)
    return float(np.square(outputs([*own, *others]) - alone).sum() / np.square(alone - alone.mean(0)).sum())


def test_answers_are_how_far_outputs_move(bert: mb.Encoder, three: list[Adapter]) -> None:
    found = measure_pairs(inputs(three), some_rows(bert)).matrices["answers"]
    for i, one in enumerate(three):
        assert found[i, i] == 0
        for j, two in enumerate(three):
            if i != j:
                assert found[i, j] == pytest.approx(answers_moved(bert, [one], [two], one.name), rel=1e-3)


def test_an_adapter_that_does_nothing_disturbs_nobody(bert: mb.Encoder, three: list[Adapter]) -> None:
    report = measure_pairs(inputs([three[0], zeroed(three[1])]), some_rows(bert))
    assert report.matrices["interference"][0, 1] < 1e-9
    assert report.matrices["interference"][1, 0] > 0
    assert report.matrices["inputs"][0, 1] == report.matrices["cosine"][0, 1] == 0
    assert math.isnan(report.matrices["norms"][0, 1])
    assert report.matrices["answers"][0, 1] < 1e-9
    assert json.dumps(to_json(Diagnosis(Invariants([], {}), report)), allow_nan=False)


def test_rows_of_a_merged_input_count_for_all_its_tasks(bert: mb.Encoder, three: list[Adapter]) -> None:
    both = merged(three[:2], "task_arithmetic", {"sst": 1.0, "sts": 1.0})
    report = measure_pairs([inputs_of(both)[0], of_adapter(three[2])], some_rows(bert))
    assert report.names == ["sst+sts", "para"]
    of_both = [answers_moved(bert, three[:2], three[2:], task) for task in ("sst", "sts")]
    assert report.matrices["answers"][0, 1] == pytest.approx(sum(of_both) / 2, rel=1e-3)
    assert report.matrices["answers"][1, 0] == pytest.approx(
        answers_moved(bert, three[2:], three[:2], "para"), rel=1e-3
    )


def test_rows_that_are_too_few_and_another_base_are_told(
    encoders: dict[str, mb.Encoder], bert: mb.Encoder, three: list[Adapter]
) -> None:
    with pytest.raises(DataError, match="1 rows; expected at least two; give more `rows`"):
        measure_pairs(inputs(three), some_rows(bert, 1))
    with pytest.raises(ModelFileError, match="doctor: made for base"):
        measure_pairs(inputs(three), some_rows(encoders["electra"]))
    with pytest.raises(CompositionError, match="two adapters of it"):
        measure_pairs(inputs([three[0], three[0]]))


def report_of(value: float, norms: float = 1.0, rows: bool = True, synthetic: bool = False) -> Report:
    """Two inputs, of which the first is expected to lose ``value`` and the second half of it."""
    square = np.eye(2)
    matrices = {"basis": np.zeros((2, 2)), "inputs": square, "outputs": np.ones((2, 2))}
    matrices |= {"norms": np.array([[1.0, norms], [1 / norms, 1.0]])}
    if not rows:
        return Report(["a", "b"], matrices, 1)
    matrices["expected"] = np.array([[0.0, value], [value / 2, 0.0]])
    return Report(["a", "b"], matrices, 1, {"a": value, "b": value / 2}, synthetic)


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.05, "gets along"), (0.051, "is disturbed"), (0.2, "is disturbed"), (0.21, "strongly affected")],
)
def test_one_number_gives_the_verdict(value: float, word: str) -> None:
    first, second, in_all = verdicts(report_of(value))
    assert (first.word, first.value, first.by) == (word, value, "b")
    assert second.value == value / 2
    assert (in_all.name, in_all.word, in_all.by) == ("in all", word, "a")


def test_without_real_rows_there_is_none() -> None:
    for report in (report_of(0.5, rows=False), report_of(0.5, synthetic=True)):
        assert verdicts(report) == []
        assert any("real rows" in hint for hint in hints(report))


def test_hints_are_to_the_point() -> None:
    assert hints(report_of(0.01)) == []
    assert any("ensemble" in hint for hint in hints(report_of(0.5)))
    assert any(
        "a is 4.0 times as large as that of b" in hint and "a=0.25" in hint for hint in hints(report_of(0.01, 4.0))
    )
    shared = report_of(0.01)
    shared.matrices["basis"][0, 1] = math.nan  # type: ignore[index]
    assert any("rows of one basis" in hint for hint in hints(shared))


def test_the_expected_loss_is_that_by_the_experts_own_account() -> None:
    source = np.random.default_rng(0)
    alone, beside = (torch.from_numpy(source.normal(size=(40, 3))) for _ in range(2))
    chances = np.exp(alone.numpy()) / np.exp(alone.numpy()).sum(1, keepdims=True)
    own = sum(max(row) for row in chances)
    other = sum(row[list(choice).index(max(choice))] for row, choice in zip(chances, beside.numpy(), strict=True))
    assert CLASSIFY.expected_loss(mb.get_task("sst"), alone, beside) == pytest.approx(1 - other / own)
    assert CLASSIFY.expected_loss(mb.get_task("sst"), alone, 3 * alone + 1) == pytest.approx(0)
    values, others = alone[:, :1], beside[:, :1]
    r = np.corrcoef(values[:, 0], others[:, 0])[0, 1]
    assert REGRESS.expected_loss(mb.get_task("sts"), values, others) == pytest.approx(1 - r)
    assert REGRESS.expected_loss(mb.get_task("sts"), values, 0 * others) == 1
    assert REGRESS.expected_loss(mb.get_task("sts"), values, 2 * values + 3) == pytest.approx(0)


def test_it_is_expected_of_plain_sums_of_two_and_of_all(bert: mb.Encoder, three: list[Adapter]) -> None:
    report = measure_pairs(inputs(three), some_rows(bert))

    def expected(own: Adapter, parts: Sequence[Adapter]) -> float:
        rows = tiny_rows(own.task, 6)
        model = merged(parts, "task_arithmetic", dict.fromkeys((one.name for one in parts), 0.5))
        alone, beside = (torch.from_numpy(mb.Predictor(one, bert).outputs(own.name, rows)) for one in (own, model))
        return kind_of(own.task).expected_loss(own.task, alone, beside)

    for i, one in enumerate(three):
        assert report.predicted_loss[one.name] == pytest.approx(expected(one, three), abs=1e-4)
        for j, two in enumerate(three):
            if i != j:
                assert report.matrices["expected"][i, j] == pytest.approx(expected(one, [one, two]), abs=1e-4)


def test_every_invariant_is_tried_and_kept(loose: list[Adapter], three: list[Adapter]) -> None:
    found = check_invariants(inputs(three[:2]))
    assert found.violated == []
    pairs = {
        method.name if space == "full" else f"{method.name} in {space}"
        for method in METHODS
        for space in (("full",) if method.linear else method.spaces)
        if method.name not in found.left_out
    }
    assert {one.what for one in found.checks if one.invariant == invariants.RELOADED} == pairs
    assert {one.what for one in found.checks if one.invariant == invariants.ORDER} == pairs
    assert {one.what for one in found.checks if one.invariant == invariants.LOSSLESS} == {"core", "knots"}
    assert {one.what for one in found.checks if one.invariant == invariants.LINEAR} == {
        method.name for method in METHODS if method.linear and method.name in pairs
    }
    for name, reason in found.left_out.items():
        assert set(METHODS.get(name).needs) - {"basis"}
        assert re.search("missing; expected .*`data` or `texts`", reason)
    other = check_invariants(inputs(loose), ["orthoada", "fedavg", "ties", "tsv"])
    assert other.violated == []
    assert "without an orthogonal basis" in other.left_out.pop("orthoada")
    assert other.left_out == {}


def test_with_rows_every_method_is_tried_and_none_takes_a_step(
    bert: mb.Encoder, three: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (distill, weighting):
        monkeypatch.setattr(module, "descend", lambda *_: pytest.fail("it learns"))
    found = check_invariants(inputs(three[:2]), context=some_rows(bert))
    assert found.violated == []
    assert found.left_out == {}
    needy = {method.name for method in METHODS if {"gram", "fisher", "rows"} & set(method.needs)}
    learn = {method.name for method in METHODS if method.learn is not None}
    assert learn < needy
    for invariant in (invariants.ALONE, invariants.ORDER, invariants.RELOADED):
        tried = {one.what for one in found.checks if one.invariant == invariant}
        assert (learn if invariant == invariants.ALONE else needy) <= tried


def test_a_method_that_learns_is_held_to_its_word(
    bert: mb.Encoder, three: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = distill._learn

    def learn(context: LearningContext) -> Learned:
        found = really(context)
        return dataclasses.replace(
            found, deltas={site: one.scaled(1.001) for site, one in (found.deltas or {}).items()}
        )

    monkeypatch.setattr(distill, "RECORD", dataclasses.replace(distill.RECORD, learn=learn))
    found = check_invariants(inputs(three[:2]), ["distill"], context=some_rows(bert))
    assert [one.invariant for one in found.violated] == [invariants.ALONE]


def test_a_method_that_learns_is_left_out_where_it_refuses_the_inputs(bert: mb.Encoder, three: list[Adapter]) -> None:
    one, two = inputs(three[:2])
    dense = dataclasses.replace(one, deltas={site: Dense(delta.dense()) for site, delta in one.deltas.items()})
    found = check_invariants([dense, two], ["distill", "adamerging"], context=some_rows(bert))
    assert found.violated == []
    assert set(found.left_out) == {"distill"}
    assert "a dense start; expected factors to learn; give `rank`" in found.left_out["distill"]


def broken(monkeypatch: pytest.MonkeyPatch, module: Any, adapters: list[Adapter], **changes: Any) -> dict[str, float]:
    """The broken invariants and their worst errors where a method has ``changes``."""
    monkeypatch.setattr(module, "RECORD", dataclasses.replace(module.RECORD, **changes))
    found = check_invariants(inputs(adapters), [module.RECORD.name])
    assert found.violated
    assert "VIOLATED" in as_text(invariant_table(found))
    return {one.invariant: one.error for one in sorted(found.violated, key=lambda one: one.error)}


def test_a_method_that_scales_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    merge = ties.RECORD.merge
    found = broken(monkeypatch, ties, three, merge=lambda site: merge(site).scaled(1.001))
    assert found == {invariants.ALONE: pytest.approx(1e-3, rel=0.05)}


def test_a_method_that_hears_the_first_most_breaks_its_word(
    monkeypatch: pytest.MonkeyPatch, three: list[Adapter]
) -> None:
    found = broken(monkeypatch, ties, three, merge=lambda site: site.weighted[0])
    assert set(found) == {invariants.ORDER}
    monkeypatch.setattr(ties, "RECORD", dataclasses.replace(ties.RECORD, order_matters=True))
    kept = check_invariants(inputs(three), ["ties"])
    assert invariants.ORDER not in {one.invariant for one in kept.checks}


def test_a_sum_that_loses_a_weight_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    def unweighted(site: Site) -> Delta:
        return dataclasses.replace(site, weights=[1.0] * len(site.weights)).weighted[0].scaled(1.0)

    found = broken(monkeypatch, orthoada, three, merge=unweighted)
    assert invariants.LINEAR in found


def test_a_merge_that_is_not_finite_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    found = broken(monkeypatch, ties, three, merge=lambda site: Dense(site.deltas[0].dense() * math.nan))
    assert found[invariants.ALONE] == math.inf


def test_a_merge_that_fails_in_its_midst_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    def fail(sites: Sequence[Site]) -> None:
        raise CompositionError(sites[0].name, "a singular matrix", "another", "change it")

    assert broken(monkeypatch, ties, three, survey=fail) == {invariants.MERGED: math.inf}


def test_a_space_that_loses_something_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    core = spaces.SPACES["core"]

    def lossy(deltas: Any) -> Any:
        inner, leave = core.enter(deltas)
        return inner, lambda merged: leave(merged).scaled(0.99)

    monkeypatch.setitem(spaces.SPACES, "core", dataclasses.replace(core, enter=lossy))
    found = {one.what: one.error for one in check_invariants(inputs(three), []).violated}
    assert found == {"core": pytest.approx(0.01)}


def test_a_file_that_changes_a_bit_breaks_its_word(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    read = invariants.read_model

    def spoiled(path: Path) -> Any:
        model = read(path)
        assert isinstance(model, Merged)
        site = next(iter(model.deltas))
        one = model.deltas[site]
        delta = Dense(one.matrix + 1e-7) if isinstance(one, Dense) else LowRank(one.B + 1e-7, one.A)
        return dataclasses.replace(model, deltas={**model.deltas, site: delta})

    monkeypatch.setattr(invariants, "read_model", spoiled)
    found = check_invariants(inputs(three[:1]), ["fedavg", "ties"])
    assert {one.invariant for one in found.violated} == {invariants.RELOADED}
    assert all(0 < one.error < 1e-5 for one in found.violated)


def test_sites_are_one_of_each_kind_in_different_layers(bert: mb.Encoder, loose: list[Adapter]) -> None:
    chosen = one_of_each_kind(inputs([random_adapter(bert, "sst")]))
    assert len({invariants.site_kind(site) for site in chosen}) == len(chosen) == 6
    assert {site.split(".")[2] for site in chosen} == {"0", "1"}
    holders = [{one.name for one in loose if site in one.sites} for site in one_of_each_kind(inputs(loose))]
    assert {"sst", "sts", "para"} in holders
    assert {"para"} in holders


def test_every_site_is_tried_where_asked(monkeypatch: pytest.MonkeyPatch, three: list[Adapter]) -> None:
    seen: set[str] = set()
    merge = ties.RECORD.merge

    def noted(site: Site) -> Delta:
        seen.add(site.name)
        return merge(site)

    monkeypatch.setattr(ties, "RECORD", dataclasses.replace(ties.RECORD, merge=noted))
    check_invariants(inputs(three[:1]), ["ties"])
    assert seen == set(one_of_each_kind(inputs(three[:1])))
    assert len(seen) == 2
    check_invariants(inputs(three[:1]), ["ties"], every_site=True)
    assert seen == set(of_adapter(three[0]).deltas)


def test_one_adapter_alone_is_a_diagnosis_too(bert: mb.Encoder, three: list[Adapter]) -> None:
    for rows in (None, some_rows(bert)):
        report = measure_pairs(inputs(three[:1]), rows)
        assert [one.value for one in verdicts(report)] == ([0, 0] if rows else [])
        assert hints(report) == []
    assert invariants.ORDER not in {one.invariant for one in check_invariants(inputs(three[:1]), ["ties"]).checks}


def test_a_probe_shares_nothing_with_an_adapter(bert: mb.Encoder, three: list[Adapter]) -> None:
    probe = random_adapter(bert, "sts", kind="probe")
    report = measure_pairs(inputs([three[0], probe]), some_rows(bert))
    assert report.matrices["inputs"][0, 1] == report.matrices["interference"][0, 1] == 0
    assert report.matrices["interference"][1, 0] > 0
    assert report.capacity is None
    assert check_invariants(inputs([three[0], probe]), ["fedavg", "ties"]).violated == []


def test_tables_and_the_picture_show_every_pair(bert: mb.Encoder, three: list[Adapter], tmp_path: Path) -> None:
    many = [*three, *(renamed(random_adapter(bert, "sst", seed=n, start=6 + n, targets="qv"), f"t{n}") for n in (3, 4))]
    report = measure_pairs(inputs(many))
    text = as_text(pair_table(report))
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [
        [one.name, two.name] for one in many for two in many if one is not two
    ]
    assert "-0.000" not in text
    assert "in all" in as_text(verdict_table(report_of(0.1)))
    write_picture(pairs_picture(report.names, report.matrices), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_call_reads_files_rows_and_the_ledger(bert: mb.Encoder, three: list[Adapter], tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", ("sst", "sts"), train=9)
    Ledger(tmp_path).take(three[0].base.fingerprint, "another", 25, 32)
    paths = []
    for one in three[:2]:
        paths.append(tmp_path / f"{one.name}.safetensors")
        write_adapter(paths[-1], one)
    found = api.doctor(paths, tmp_path / "data", methods=["fedavg"], rows=4, base=bert)
    assert set(found.report.matrices) == set(EVERY)
    assert found.report.capacity == (32 - 25) // 3
    told = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert told["matrices"]["interference"][0][1] == found.report.matrices["interference"][0, 1]
    assert [one["name"] for one in told["verdicts"]] == ["sst", "sts", "in all"]
    assert "interference" not in api.doctor(three[:2], methods=["fedavg"]).report.matrices
