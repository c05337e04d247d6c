"""Merging: linear methods against brute force, weights, and what may and may not meet."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.composing.merging import parse_weights
from mergekit_bert.errors import BasisError, CompositionError, MbertError, ModelFileError, UnknownNameError
from mergekit_bert.formats.inputs import choose_inputs
from mergekit_bert.models.composition import find_task
from tests.adapters.helpers import dense64, quick, random_adapter, renamed, same_adapter, same_tensors
from tests.composing.helpers import LINEAR, ONE, brute_force, merge, merged, trio, zeroed
from tests.tiny import DISTINCT

NAMES = ("sst", "sts", "para")
WEIGHTS = st.fixed_dictionaries({name: st.floats(-2, 2) for name in NAMES})


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, train_bias=True, train_layernorm=True)


@settings(quick, max_examples=20)
@given(method=st.sampled_from(LINEAR), weights=WEIGHTS)
def test_a_linear_merge_is_the_dense_sum(three: list[Adapter], method: str, weights: dict[str, float]) -> None:
    model, exact = merged(three, method, weights), brute_force(three, weights)
    assert model.weights == weights
    assert model.deltas.keys() == exact.keys()
    for site, delta in model.deltas.items():
        np.testing.assert_allclose(delta.dense(), exact[site], atol=2e-5)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("architecture", DISTINCT)
def test_so_it_is_in_every_architecture(encoders: dict[str, mb.Encoder], architecture: str, method: str) -> None:
    adapters = trio(encoders[architecture])
    model = merged(adapters, method)
    exact = brute_force(adapters, model.weights)
    assert model.deltas.keys() == exact.keys() == {site for site in adapters[0].sites if not site.startswith("pooler")}
    for site, delta in model.deltas.items():
        np.testing.assert_allclose(delta.dense(), exact[site], atol=2e-5)


@settings(quick, max_examples=20)
@given(method=st.sampled_from(LINEAR), weights=WEIGHTS)
def test_shifts_add_up_linearly(three: list[Adapter], method: str, weights: dict[str, float]) -> None:
    model = merged(three, method, weights)
    for name, shift in model.shifts.items():
        exact = sum(weights[one.name] * one.shifts[name].double() for one in three)
        np.testing.assert_allclose(shift, exact, atol=1e-6)


def test_a_shift_that_only_one_has_is_kept(bert: mb.Encoder) -> None:
    one, two = random_adapter(bert, "sst", train_bias=True), random_adapter(bert, "sts", start=3, train_layernorm=True)
    model = merged([one, two], "orthoada", {"sst": -2.0, "sts": 0.5})
    expected = {name: -2 * value for name, value in one.shifts.items()}
    expected |= {name: 0.5 * value for name, value in two.shifts.items()}
    assert torch.equal(model.own["sst"].shifts["pooler.dense.bias"], one.shifts["pooler.dense.bias"])
    expected.pop("pooler.dense.bias")
    assert same_tensors(model.shifts, expected)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.5, 3.0, 0.0])
def test_a_weight_scales_a_delta_once_and_keeps_its_sign(three: list[Adapter], method: str, weight: float) -> None:
    model = merged(three[:1], method, {"sst": weight})
    for site, delta in model.deltas.items():
        np.testing.assert_allclose(delta.dense(), weight * dense64(three[0])[site], atol=1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_opposite_weights_give_opposite_merges(three: list[Adapter], method: str) -> None:
    weights = dict(zip(NAMES, (0.3, -1.0, 2.0), strict=True))
    one, two = merged(three, method, weights), merged(three, method, {name: -w for name, w in weights.items()})
    assert one.deltas.keys() == two.deltas.keys()
    for site in one.deltas:
        np.testing.assert_allclose(one.deltas[site].dense(), -two.deltas[site].dense(), atol=1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_a_zero_adapter_changes_nothing(three: list[Adapter], method: str) -> None:
    weights = dict(zip(NAMES, (0.3, 0.7, 5.0), strict=True))
    with_zero = merged([*three[:2], zeroed(three[2])], method, weights)
    without = merged(three[:2], method, {name: weights[name] for name in NAMES[:2]})
    for site in without.deltas:
        np.testing.assert_allclose(with_zero.deltas[site].dense(), without.deltas[site].dense(), atol=1e-6)
    for name in without.shifts:
        np.testing.assert_allclose(with_zero.shifts[name], without.shifts[name], atol=1e-6)


@pytest.mark.parametrize("method", LINEAR)
def test_ranks_targets_and_scales_may_differ(bert: mb.Encoder, method: str) -> None:
    adapters = [
        random_adapter(bert, "sst", rank=2, targets="qv", alpha=1.0),
        random_adapter(bert, "sts", rank=7, start=2, targets="attention", rank_stabilized=True),
        random_adapter(bert, "para", rank=5, start=9, targets=ONE),
    ]
    weights = dict(zip(NAMES, (1.0, -0.5, 2.0), strict=True))
    model, exact = merged(adapters, method, weights), brute_force(adapters, weights)
    assert model.deltas.keys() == exact.keys()
    assert len(exact) == 8
    for site, delta in model.deltas.items():
        np.testing.assert_allclose(delta.dense(), exact[site], atol=1e-5)


def test_what_comes_after_the_layers_stays_each_tasks_own(three: list[Adapter]) -> None:
    model = merged(three, "fedavg")
    assert not [site for site in model.deltas if site.startswith("pooler")]
    for one in three:
        own = model.own[one.name]
        assert own.deltas.keys() == {"pooler.dense"}
        np.testing.assert_allclose(own.deltas["pooler.dense"].dense(), dense64(one)["pooler.dense"], atol=1e-6)
        assert same_tensors(own.shifts, {"pooler.dense.bias": one.shifts["pooler.dense.bias"]})
        part = model.part(one.name)
        assert part.deltas["pooler.dense"] is own.deltas["pooler.dense"]
        assert part.deltas.keys() == one.sites.keys()
        assert part.shifts.keys() == one.shifts.keys()


def test_averaging_factors_apart_would_be_something_else(three: list[Adapter]) -> None:
    model = merged(three, "fedavg", dict.fromkeys(NAMES, 1 / 3))
    for site, delta in model.deltas.items():
        means = [sum(one.tensors[site][name].double() for one in three) / 3 for name in ("B", "A")]
        apart = three[0].config.scale * (means[0] @ means[1])
        assert float((apart - delta.dense()).abs().max()) > 0.01


def test_more_ranks_than_the_matrix_has_stay_exact(bert: mb.Encoder) -> None:
    adapters = [
        renamed(random_adapter(bert, "sst", seed=n, rank=8, basis="random", targets=ONE), f"t{n}") for n in range(9)
    ]
    model = merged(adapters, "task_arithmetic", {one.name: 1.0 for one in adapters})
    delta = model.deltas[ONE]
    assert isinstance(delta, type(adapters[0].deltas()[ONE]))
    assert delta.rank == 32
    exact = brute_force(adapters, model.weights)[ONE]
    np.testing.assert_allclose(delta.dense(), exact, atol=1e-4)


def test_every_task_keeps_its_head_and_its_provenance(three: list[Adapter]) -> None:
    model = merged(three, "fedavg")
    assert [task.name for task in model.tasks] == list(NAMES)
    for one in three:
        part = model.part(one.name)
        assert same_tensors(part.head, one.head)
        assert part.task == dataclasses.replace(one.task, hub=None)
        assert model.parts[one.name]["sha256"] == one.sha256()
        assert model.parts[one.name]["training"] == one.training


def test_the_default_weights_of_fedavg_are_the_shares_of_examples(three: list[Adapter]) -> None:
    assert merged(three, "fedavg").weights == pytest.approx({"sst": 0.1, "sts": 0.3, "para": 0.6})
    assert merged(three[1:], "fedavg").weights == pytest.approx({"sts": 1 / 3, "para": 2 / 3})
    assert merged(three, "fedavg", {"sts": 2.0}).weights == pytest.approx({"sst": 0.1, "sts": 2, "para": 0.6})


@pytest.mark.parametrize(
    ("method", "weights"),
    [("orthoada", [1.0, 1.0, 1.0]), ("task_arithmetic", [0.4, 0.4, 0.4])],
)
def test_the_default_weights_of_sums(three: list[Adapter], method: str, weights: list[float]) -> None:
    assert list(merged(three, method).weights.values()) == weights
    assert list(merged(three[:1], method).weights.values()) == [1.0]


@pytest.mark.parametrize("training", [{}, {"examples": 0}, {"examples": "many"}, {"examples": None}])
def test_fedavg_without_counts_needs_weights(three: list[Adapter], training: dict[str, object]) -> None:
    odd = [three[0], dataclasses.replace(three[1], training=training)]
    with pytest.raises(CompositionError, match=r"adapter 'sts': no example count.*give `weights` for all adapters"):
        merge(odd, "fedavg")
    assert merged(odd, "fedavg", {"sst": 0.5, "sts": 0.25}).weights == {"sst": 0.5, "sts": 0.25}


def test_orthogonal_deltas_do_not_meet(three: list[Adapter]) -> None:
    deltas = [one.deltas() for one in three]
    for site in deltas[0]:
        for i, one in enumerate(deltas):
            for two in deltas[:i]:
                assert float((one[site].dense().double() @ two[site].dense().double().T).abs().max()) < 1e-5


def test_along_its_own_rows_every_adapter_is_kept_whole(three: list[Adapter]) -> None:
    model = merged(three, "orthoada")
    for site, delta in model.deltas.items():
        for one in three:
            own = one.tensors[site]
            np.testing.assert_allclose(delta.dense() @ own["A"].T, one.config.scale * own["B"], atol=1e-5)


def test_orthoada_names_an_adapter_without_a_basis(bert: mb.Encoder, three: list[Adapter]) -> None:
    loose = random_adapter(bert, "sts", basis="random")
    with pytest.raises(BasisError, match=r"sts trained without an orthogonal basis.*or use `method=fedavg`"):
        merge([three[0], loose], "orthoada")


def test_orthoada_names_different_bases(three: list[Adapter]) -> None:
    other = dataclasses.replace(three[1], basis=BasisRows(9, 3, 3))
    with pytest.raises(BasisError, match=r"sst seed 0, sts seed 9.*`method=fedavg`"):
        merge([three[0], other], "orthoada")


def test_orthoada_names_colliding_adapters(three: list[Adapter], bert: mb.Encoder) -> None:
    other = random_adapter(bert, "sts", start=2)
    with pytest.raises(
        BasisError, match=r"sst .rows 0–2. and sts .rows 2–4. collide.*train sts again in the folder of sst"
    ):
        merge([three[0], other], "orthoada")
    merge([three[0], other], "fedavg")


def test_two_adapters_of_one_task_are_refused(three: list[Adapter], bert: mb.Encoder) -> None:
    with pytest.raises(CompositionError, match=r"task 'sst': two adapters of it.*leave one out"):
        merge([three[0], random_adapter(bert, "sst", start=20)], "fedavg")


@pytest.mark.parametrize("method", [*LINEAR, "ensemble"])
def test_different_bases_and_tokenizers_are_refused(
    three: list[Adapter], encoders: dict[str, mb.Encoder], method: str
) -> None:
    with pytest.raises(CompositionError, match=r"adapters 'sst' and 'sts': different bases .*same `base`"):
        merge([three[0], random_adapter(encoders["electra"], "sts", start=3)], method)
    base = dataclasses.replace(three[1].base, tokenizer_fingerprint="0" * 64)
    with pytest.raises(CompositionError, match="adapters 'sst' and 'sts': different tokenizers"):
        merge([three[0], dataclasses.replace(three[1], base=base)], method)


def test_the_name_of_the_base_does_not_matter(three: list[Adapter]) -> None:
    elsewhere = dataclasses.replace(three[1], base=dataclasses.replace(three[1].base, name="/another/folder"))
    assert len(merge([three[0], elsewhere], "fedavg").tasks) == 2


@pytest.mark.parametrize(
    ("count", "method", "weights", "kind", "message"),
    [
        (0, "fedavg", None, CompositionError, "no adapters; expected at least one"),
        (2, "fedawg", None, UnknownNameError, "did you mean 'fedavg'"),
        (2, "fedavg", {"para": 1.0}, CompositionError, "`weights`: 'para'; expected names among sst, sts"),
        (2, "ensemble", {"sst": 1.0}, CompositionError, "weights for an ensemble.*drop `weights`"),
        (2, "fedavg", {"sst": math.nan}, CompositionError, "`weights`: 'sst=nan'; expected .*number"),
        (2, "fedavg", {"sst": math.inf}, CompositionError, "`weights`: 'sst=inf'; expected .*number"),
    ],
)
def test_what_cannot_be_merged_is_told(
    three: list[Adapter],
    count: int,
    method: str,
    weights: dict[str, float] | None,
    kind: type[MbertError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        merge(three[:count], method, weights)


def test_an_ensemble_keeps_its_experts(three: list[Adapter]) -> None:
    model = merge(three, "ensemble")
    assert isinstance(model, mb.Ensemble)
    assert list(model.experts) == list(NAMES)
    assert all(model.experts[one.name] is one for one in three)
    assert model.base == three[0].base


def test_an_unknown_task_is_told(three: list[Adapter]) -> None:
    with pytest.raises(CompositionError, match="'cola'; expected one of sst, sts, para"):
        find_task(merge(three, "ensemble"), "cola")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", {}),
        ("sst=1", {"sst": 1.0}),
        ("sst=1,para=-0.5", {"sst": 1.0, "para": -0.5}),
        (" my-task = 2e-3 , sts= 0 ,", {"my-task": 2e-3, "sts": 0.0}),
    ],
)
def test_weights_are_read(text: str, weights: dict[str, float]) -> None:
    assert parse_weights(text) == weights


@pytest.mark.parametrize(
    "text", ["sst", "sst=", "sst=one", "sst=nan", "sst=inf", "sst=1=2", "1", "sst=1e999", "sst=1,sst=2"]
)
def test_weights_that_are_none_are_told(text: str) -> None:
    with pytest.raises(CompositionError, match=r"`weights`: 'sst.*'; expected|`weights`: '1'; expected"):
        parse_weights(text)


@quick
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), st.floats(-1e6, 1e6), max_size=4))
def test_weights_come_back_from_text(weights: dict[str, float]) -> None:
    assert parse_weights(",".join(f"{name}={value!r}" for name, value in weights.items())) == weights


@pytest.fixture
def folder(bert: mb.Encoder, tmp_path: Path) -> Path:
    """Adapters of two tasks, three of them of one; and a probe."""
    for name, task, seed in (("a", "sst", 0), ("b", "sst", 1), ("c", "sst", 2), ("d", "para", 3)):
        write_adapter(tmp_path / f"{name}.safetensors", random_adapter(bert, task, seed=seed, targets="qv"))
    write_adapter(tmp_path / "probe.safetensors", random_adapter(bert, "sts", kind="probe"))
    return tmp_path


def paths(folder: Path, names: str) -> list[Path]:
    return [folder / f"{name}.safetensors" for name in names]


@pytest.mark.parametrize(
    ("files", "keep", "chosen"),
    [
        ("ad", "", [("sst", 0), ("para", 3)]),
        ("da", "", [("para", 3), ("sst", 0)]),
        ("abd", "a", [("sst", 0), ("para", 3)]),
        ("abd", "b", [("sst", 1), ("para", 3)]),
        ("abcd", "a", [("sst", 0), ("para", 3)]),
        ("abcd", "b", [("sst", 1), ("para", 3)]),
        ("abcd", "c", [("sst", 2), ("para", 3)]),
        ("", "c", [("sst", 2), ("para", 3)]),
    ],
)
def test_files_are_chosen(bert: mb.Encoder, folder: Path, files: str, keep: str, chosen: list[tuple[str, int]]) -> None:
    found = choose_inputs(paths(folder, files), paths(folder, keep), folder)
    expected = [random_adapter(bert, task, seed=seed, targets="qv") for task, seed in chosen]
    assert [one.name for one in found] == [task for task, _ in chosen]
    assert all(same_adapter(one.adapter, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("files", "keep"), [("ab", ""), ("abd", "d"), ("abc", "ab"), ("", "")])
def test_two_files_of_one_task_are_told_with_the_way_out(folder: Path, files: str, keep: str) -> None:
    with pytest.raises(
        CompositionError, match=r"task 'sst': two adapters of it, .*a.safetensors and .*b.safetensors.*`keep="
    ):
        choose_inputs(paths(folder, files), paths(folder, keep), folder)


def test_a_named_probe_is_taken(folder: Path) -> None:
    assert [one.name for one in choose_inputs([folder / "probe.safetensors"], [], folder)] == ["sts"]


def test_a_folder_without_adapters_is_told(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"no adapters.*name them, or train some"):
        choose_inputs([], [], tmp_path)


def test_a_broken_file_is_named(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"b\.safetensors: not readable"):
        choose_inputs(paths(folder, "ab"), [], folder)


def test_merging_needs_no_grad(three: list[Adapter]) -> None:
    model = merged(three, "orthoada")
    assert not any(delta.dense().requires_grad for delta in model.deltas.values())
    assert all(delta.dense().dtype == torch.float32 for delta in model.deltas.values())
