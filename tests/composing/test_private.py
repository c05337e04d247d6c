"""Private residuals: at full rank the experts themselves, below it the best that a rank gives, wherever models go."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.delta import Dense, LowRank
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.composing.calibration import calibrate_heads, calibrate_scales
from mergekit_bert.composing.merge_input import inputs_of
from mergekit_bert.composing.merging import merge as compose
from mergekit_bert.composing.merging import merge_inputs_of
from mergekit_bert.composing.recipe import Recipe, read_recipe, write_recipe
from mergekit_bert.composing.weighting import Blend
from mergekit_bert.data.batches import tokenise
from mergekit_bert.data.rows import Rows
from mergekit_bert.encoder.forward import forward_rows, scaled
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.encoder.stored import open_encoder
from mergekit_bert.errors import CompositionError, ModelFileError
from mergekit_bert.evaluation.describe import describe, description_tables
from mergekit_bert.evaluation.merge_results import MergeResult
from mergekit_bert.evaluation.tables import as_text
from mergekit_bert.formats import checkpoint, dense
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.prediction import Predictor
from tests.adapters.helpers import edit_metadata, edit_tensors, random_adapter
from tests.cli.command import mbert
from tests.composing.helpers import given, merge, merged, trio
from tests.formats.test_checkpoint import fine_tuned
from tests.formats.test_file import same_merged
from tests.tiny import tiny_rows

TASKS = ("sst", "sts", "para")
ALL = 99
"""More than any rank there is."""
SITE = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def three(bert: Encoder) -> list[Adapter]:
    """Unlike in rank, and the last without some sites."""
    uneven = {"train_bias": True, "train_layernorm": True, "basis": "random"}
    first, second, _ = trio(bert, **uneven)
    third = random_adapter(bert, "para", seed=7, rank=5, examples=600, **{**uneven, "targets": "qv"})
    return [first, second, third]


def rows(task: str, count: int = 12) -> Rows:
    return tiny_rows(mb.get_task(task), count, seed=3)


def same_answers(found: Any, exact: Any, encoder: Encoder, tolerance: float = 1e-4) -> None:
    """The outputs of two models on all tasks, which are told apart by them."""
    one, two = Predictor(found, encoder), Predictor(exact, encoder)
    for task in exact.tasks:
        expected = two.outputs(task.name, rows(task.name))
        assert expected.std() > 1e-2
        np.testing.assert_allclose(one.outputs(task.name, rows(task.name)), expected, atol=tolerance)


@pytest.mark.parametrize("method", ["fedavg", "ties"])
def test_at_full_rank_a_merge_is_the_ensemble(bert: Encoder, three: list[Adapter], method: str) -> None:
    model, experts = merged(three, method, private=ALL), merge(three, "ensemble")
    same_answers(model, experts, bert)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        same_answers(merged(three, method), experts, bert)


def test_at_full_rank_a_merge_is_the_ensemble_on_any_encoder(encoder: Encoder) -> None:
    adapters = trio(encoder, train_bias=True, train_layernorm=True)
    same_answers(merged(adapters, "iso_c", private=ALL), merge(adapters, "ensemble"), encoder)


@pytest.mark.parametrize(("method", "rank"), [("iso_c", None), ("ties", None), ("task_arithmetic", 2)])
def test_a_remainder_is_as_near_as_any_of_its_rank(three: list[Adapter], method: str, rank: int | None) -> None:
    """Eckart & Young 1936: what is left is the tail of the singular values of the difference."""
    model, plain = merged(three, method, rank=rank, private=4), merged(three, method, rank=rank)
    compared = 0
    for one in three:
        own = model.own[one.name]
        exact = {site: delta.dense().double().numpy() for site, delta in one.deltas().items()}
        assert {site for site in own.deltas if not of_the_head(site)} == set(model.deltas)
        for site, shared in plain.deltas.items():
            assert np.array_equal(shared.dense(), model.deltas[site].dense()), "what is shared stays as it is"
            missing = exact.get(site, 0.0) - shared.dense().double().numpy()
            values = np.linalg.svd(missing, compute_uv=False)
            residual = own.deltas[site]
            assert isinstance(residual, LowRank)
            assert residual.rank <= 4
            left = np.linalg.norm(missing - residual.dense().double().numpy())
            tail = np.sqrt(np.square(values[4:]).sum())
            assert left == pytest.approx(tail, rel=1e-4, abs=1e-5 * values[0])
            compared += bool(tail > 0.01 * values[0])
    assert compared > 20


def test_a_remainder_of_more_rank_is_never_further_from_the_expert(bert: Encoder, three: list[Adapter]) -> None:
    def left(private: int | None) -> float:
        model, exact = merged(three, "iso_c", private=private), three[0].deltas()
        part = model.part("sst")
        return sum(float((part.deltas[site].dense() - delta.dense()).square().sum()) for site, delta in exact.items())

    found = [left(private) for private in (None, 1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


def test_biases_and_norms_are_kept_in_full_at_any_rank(three: list[Adapter]) -> None:
    part = merged(three, "fedavg", private=1).part("sts")
    assert part.shifts.keys() == three[1].shifts.keys()
    for name, shift in three[1].shifts.items():
        np.testing.assert_allclose(part.shifts[name], shift, atol=1e-6)


def test_no_remainders_give_the_bytes_of_before(three: list[Adapter], tmp_path: Path) -> None:
    for name, private in (("none", None), ("zero", 0)):
        write_model(tmp_path / name, merged(three, "iso_c", private=private))
    assert (tmp_path / "none").read_bytes() == (tmp_path / "zero").read_bytes()
    assert b"private" not in (tmp_path / "none").read_bytes()
    assert not merged(three, "iso_c").private


def test_one_adapter_merged_with_its_own_weight_leaves_nothing(three: list[Adapter]) -> None:
    model = merged(three[:1], "task_arithmetic", {"sst": 1.0}, private=3)
    assert model.private["rank"] == 0
    assert {delta.rank for site, delta in model.own["sst"].deltas.items() if site in model.deltas} == {0}  # type: ignore[union-attr]


def test_a_model_comes_back_as_it_was_and_says_what_it_keeps(three: list[Adapter], tmp_path: Path) -> None:
    model = merged(three, "iso_c", private=2)
    write_model(tmp_path / "x", model)
    found = read_model(tmp_path / "x")
    assert isinstance(found, mb.Merged)
    assert same_merged(found, model)
    assert found.title == "iso_c + private 2"
    assert Recipe.from_json(found.recipe).private == 2
    write_model(tmp_path / "y", found)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    write_model(tmp_path / "bare", merged(three, "iso_c"))
    held = sum(one.numel() * 4 for one in residuals_of(model).values())
    grown = (tmp_path / "x").stat().st_size - (tmp_path / "bare").stat().st_size
    assert held < grown < 3 * held, "the names of many small tensors count too"
    assert model.private == {"rank": 2, "bytes": held}
    told = describe(tmp_path / "x")
    assert told["private"] == model.private
    assert "residuals of rank 2 or less" in "".join(map(as_text, description_tables(told)))


def residuals_of(model: mb.Merged) -> dict[str, Tensor]:
    """Every tensor that a task keeps beside a shared one."""
    found: dict[str, Tensor] = {}
    for task, own in model.own.items():
        for site, delta in own.deltas.items():
            if not of_the_head(site):
                assert isinstance(delta, LowRank)
                found |= {f"{task} {site} B": delta.B, f"{task} {site} A": delta.A}
        found |= {f"{task} {name}": shift for name, shift in own.shifts.items() if not of_the_head(name)}
    return found


OWN_B, OWN_A = f"own.sst.site.{SITE}.B", f"own.sst.site.{SITE}.A"


def of_another_shape(path: Path) -> None:
    """A residual whose tensors and record agree with each other, and not with the shared Delta."""
    edit_tensors(lambda t: t.update({OWN_B: torch.zeros(32, 2)}))(path)
    edit_metadata(lambda m: m["merged"]["own"]["sst"]["sites"][SITE].update(size=[32, 32]))(path)


def of_another_length(path: Path) -> None:
    name = "encoder.layer.0.output.LayerNorm.bias"
    edit_tensors(lambda t: t.update({f"own.sst.shift.{name}": torch.zeros(7)}))(path)
    edit_metadata(lambda m: m["merged"]["own"]["sst"]["shifts"].update({name: [7]}))(path)


def of_another_rank(path: Path) -> None:
    edit_tensors(lambda t: t.update({OWN_B: torch.zeros(48, 5), OWN_A: torch.zeros(5, 32)}))(path)
    edit_metadata(lambda m: m["merged"]["own"]["sst"]["sites"][SITE].update(rank=5))(path)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (of_another_shape, f"site '{SITE}' of 'sst' has another shape than the shared one"),
        (of_another_length, "LayerNorm.bias' of 'sst' has another shape than the shared one"),
        (of_another_rank, "private {.*'rank': 2.*}, where the tasks keep {'rank': 5"),
        (edit_metadata(lambda m: m["merged"].pop("private")), "private {}, where the tasks keep {'rank': 2"),
        (edit_metadata(lambda m: m["merged"]["private"].update(bytes=8)), "broken metadata \\(private"),
        (edit_tensors(lambda t: t.pop(OWN_A)), "is missing"),
    ],
)
def test_what_does_not_fit_in_a_file_is_told(three: list[Adapter], tmp_path: Path, corrupt: Any, message: str) -> None:
    write_model(tmp_path / "x", merged(three, "iso_c", private=2))
    corrupt(tmp_path / "x")
    with pytest.raises(ModelFileError, match=message):
        read_model(tmp_path / "x")


def test_remainders_told_of_a_file_that_has_none_are_refused(three: list[Adapter], tmp_path: Path) -> None:
    write_model(tmp_path / "x", merged(three, "iso_c"))
    edit_metadata(lambda m: m["merged"].update(private={"rank": 2, "bytes": 8}))(tmp_path / "x")
    with pytest.raises(ModelFileError, match="where the tasks keep nothing"):
        read_model(tmp_path / "x")


def test_mixed_rows_get_the_answers_of_one_by_one(encoder: Encoder) -> None:
    model = merged(trio(encoder, train_bias=True, train_layernorm=True), "iso_c", private=2)
    predictor = Predictor(model, encoder)
    requests = [(task, row if len(row) > 1 else row[0]) for place in range(5) for task in TASKS
                for row in [rows(task, 5).texts[place]]]  # fmt: skip
    for (task, text), answer in zip(requests, predictor.mixed(requests), strict=True):
        alone = predictor.predict(task, [text])[0]
        np.testing.assert_allclose(answer.outputs, alone.outputs, rtol=1e-4, atol=1e-4)


def test_peft_and_dense_folders_give_the_same_answers(bert: Encoder, three: list[Adapter], tmp_path: Path) -> None:
    model = merged(three, "iso_c", private=2)
    write_model(tmp_path / "x", model)
    for folder in mb.convert(tmp_path / "x", "peft", tmp_path / "peft", base=bert):
        mb.convert(folder, "mbert", tmp_path / f"{folder.name}.safetensors", base=bert)
        same_answers(model, mb.load(tmp_path / f"{folder.name}.safetensors"), bert)
    exact = {f"{site}.weight": delta.dense() for site, delta in model.part("sts").deltas.items()}
    exact |= model.part("sts").shifts
    for folder in mb.export(model, tmp_path / "dense", base=bert):  # it compares the outputs by itself
        found = load_file(folder / "model.safetensors")
        if folder.name == "sts":
            for name, change in exact.items():
                np.testing.assert_allclose(found[f"bert.{name}"], bert.weights[name] + change, atol=1e-5, err_msg=name)
    assert (tmp_path / "dense" / "para").is_dir()


def test_a_dense_merge_is_no_peft_folder_with_remainders_either(
    bert: Encoder, three: list[Adapter], tmp_path: Path
) -> None:
    write_model(tmp_path / "x", merged(three, "ties", private=2))
    with pytest.raises(CompositionError, match="a dense Delta; expected low-rank ones"):
        mb.convert(tmp_path / "x", "peft", tmp_path / "peft", base=bert)


def test_a_merge_of_a_merge_keeps_its_remainders(bert: Encoder, three: list[Adapter], tmp_path: Path) -> None:
    write_model(tmp_path / "x", merged(three[:2], "fedavg", private=2))
    first = read_model(tmp_path / "x")
    assert isinstance(first, mb.Merged)
    model = merged([first, three[2]], "task_arithmetic")  # type: ignore[list-item]
    assert model.private["rank"] == 2
    for task in ("sst", "sts"):
        for name in ("deltas", "shifts"):
            kept, before = getattr(model.own[task], name), getattr(first.own[task], name)
            assert kept.keys() == before.keys()
    for site, delta in first.own["sst"].deltas.items():
        assert np.array_equal(model.own["sst"].deltas[site].dense(), delta.dense())
        if site in model.deltas:
            total = model.deltas[site].dense() + delta.dense()
            np.testing.assert_allclose(model.part("sst").deltas[site].dense(), total, atol=1e-5)
    assert not set(model.own["para"].deltas) & set(model.deltas)


def test_a_merge_of_a_merge_at_full_rank_is_its_inputs(bert: Encoder, three: list[Adapter]) -> None:
    first = merged(three[:2], "iso_c", private=1)
    model = merged([first, three[2]], "tsv", private=ALL)  # type: ignore[list-item]
    same_answers(model, first, bert)
    same_answers(model, three[2], bert)
    again = merged([merged(three[:2], "iso_c", private=ALL), three[2]], "tsv", private=ALL)  # type: ignore[list-item]
    same_answers(again, merge(three, "ensemble"), bert)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), ("bf16", 0.3)])
def test_distillation_sees_the_remainders_of_a_merge(
    bert: Encoder, three: list[Adapter], precision: str, most: float
) -> None:
    """A merge taken with weight 1 and its residuals answers as itself: there is nothing to learn."""
    first = merged(three[:2], "fedavg", private=2)
    options = {"steps": 2, "lr": 0.0, "batch_size": 4, "precision": precision}
    model = merged([first], "distill", {"sst+sts": 1.0}, options=options, given=given(bert))  # type: ignore[list-item]
    same_answers(model, first, bert)
    assert model.trace["learned"]["first_loss"] < most


def test_learned_weights_see_the_remainders_of_a_merge(bert: Encoder, three: list[Adapter]) -> None:
    first = merged(three[:2], "fedavg", private=2)
    blend = Blend(bert, inputs_of(first), lambda site: "", 1.0)
    for task in ("sst", "sts"):
        part = first.part(task)
        found, exact = blend.model(part, first.own[task]), Predictor(first, bert)
        tokens = tokenise(rows(task), part.task, bert.tokenizer, part.max_length, bert.pad_token)
        outputs = scaled(forward_rows(found, tokens), part.task)
        np.testing.assert_allclose(outputs, exact.outputs(task, rows(task)), atol=1e-4)


def test_what_is_learned_is_the_same_and_the_remainders_are_of_it(bert: Encoder, three: list[Adapter]) -> None:
    options = {"steps": 3, "batch_size": 4, "precision": "fp32"}
    model = merged(three, "distill", options=options, given=given(bert), private=ALL)
    plain = merged(three, "distill", options=options, given=given(bert))
    for site, delta in plain.deltas.items():
        assert np.array_equal(delta.dense(), model.deltas[site].dense())
    same_answers(model, merge(three, "ensemble"), bert)


def test_heads_are_calibrated_over_the_remainders_and_these_stay(bert: Encoder, three: list[Adapter]) -> None:
    model = merged(three, "fedavg", private=3)
    found = calibrate_heads(model, bert, {task: tiny_rows(mb.get_task(task), 40) for task in TASKS})
    assert residuals_of(found).keys() == residuals_of(model).keys()
    assert all(torch.equal(value, residuals_of(model)[name]) for name, value in residuals_of(found).items())
    assert found.title == "fedavg + private 3 + heads"


def test_remainders_are_taken_anew_beside_scaled_deltas(bert: Encoder, three: list[Adapter]) -> None:
    model = merged(three, "fedavg", private=ALL)
    head = {name: value + 1 for name, value in model.own["sst"].head.items()}
    model = dataclasses.replace(model, own={**model.own, "sst": dataclasses.replace(model.own["sst"], head=head)})
    scaled = calibrate_scales(model, merge_inputs_of(three), bert, {task: rows(task) for task in TASKS})
    assert any(abs(scale - 1) > 0.1 for scale in scaled.trace["calibrated"]["scales"]["sites"].values())
    same_answers(scaled, model, bert)


def test_a_file_that_kept_its_inputs_keeps_the_recipe_of_remainders(three: list[Adapter], tmp_path: Path) -> None:
    for one in three:
        write_adapter(tmp_path / f"{one.name}.safetensors", one)
    paths = [tmp_path / f"{one.name}.safetensors" for one in three]
    whole = tmp_path / "whole.safetensors"
    mb.save(mb.merge(paths, "iso_c", private=2, keep_inputs=True), whole)
    inputs, recipe = mb.changed_inputs([whole], [], ["para"])
    assert recipe.private == 2
    found = mb.merge(inputs, recipe)
    assert isinstance(found, mb.Merged)
    assert same_merged(found, merged(three[:2], "iso_c", private=2))


def of_parameters(folder: Path) -> Mapping[str, Tensor]:
    return {name.partition(".")[2]: value for name, value in load_file(folder / "model.safetensors").items()}


def test_whole_checkpoints_are_streamed_with_their_remainders(bert: Encoder, tmp_path: Path) -> None:
    paths = [fine_tuned(bert, name, tmp_path / name, seed) for seed, name in enumerate(("sst", "sts"), 1)]
    model = compose([checkpoint.read_checkpoint(path) for path in paths], Recipe("fedavg", private=3), lazy=True)
    assert isinstance(model, mb.Merged)
    folders = dense.write_dense(tmp_path / "out", model, open_encoder(bert.name))
    eager = mb.merge(paths, "fedavg", private=3)
    assert isinstance(eager, mb.Merged)
    for folder in folders:
        part, found, expert = eager.part(folder.name), of_parameters(folder), of_parameters(tmp_path / folder.name)
        for site, delta in part.deltas.items():
            weight = bert.weights[f"{site}.weight"] + delta.dense()
            np.testing.assert_allclose(found[f"{site}.weight"], weight, atol=1e-5, err_msg=site)
        for name in (name for name in bert.weights if bert.weights[name].dim() == 1):
            np.testing.assert_allclose(found[name], expert[name], atol=1e-6, err_msg=name)
        words = "embeddings.word_embeddings.weight"
        assert words not in eager.own[folder.name].shifts, "what is no vector is shared"
        np.testing.assert_allclose(found[words], bert.weights[words] + eager.shifts[words], atol=1e-6)
        assert not np.allclose(found[words], expert[words], atol=1e-3)


def test_dense_deltas_have_low_rank_remainders(three: list[Adapter]) -> None:
    model = merged(three, "ties", private=2)
    assert {type(delta) for delta in model.deltas.values()} == {Dense}
    assert all(isinstance(own.deltas[SITE], LowRank) for own in model.own.values())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("fedavg", private=-1), "`private`: -1; expected a whole number from 0 to 65536; correct `private`"),
        (Recipe("ensemble", private=2), "`private`: residuals for an ensemble; expected none: it keeps the experts"),
    ],
)
def test_what_cannot_be_is_refused(three: list[Adapter], recipe: Recipe, message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        mb.merge(three, recipe)


def test_a_recipe_says_it_in_yaml_and_a_cell_in_its_name(tmp_path: Path) -> None:
    recipe = Recipe("iso_c", private=4, inputs=["a", "b"])
    write_recipe(tmp_path / "r.yml", recipe)
    assert read_recipe(tmp_path / "r.yml") == recipe == Recipe.from_json(recipe.to_json())
    (tmp_path / "r.yml").write_text("method: iso_c\nprivate: 1.5\n")
    with pytest.raises(CompositionError, match=r"line 2, key 'private': 1\.5; expected a whole number"):
        read_recipe(tmp_path / "r.yml")
    assert MergeResult(recipe, {}, 0.0, 0, None).name == "iso_c + private 4"


def test_the_command_says_what_each_task_keeps(three: list[Adapter], tmp_path: Path) -> None:
    for one in three:
        write_adapter(tmp_path / f"{one.name}.safetensors", one)
    files = [f"{one.name}.safetensors" for one in three]
    done = mbert("merge", *files, "--method", "iso_c", "--private", "4", "--out", "m.safetensors", here=tmp_path)
    assert done.code == 0, done.err
    assert "iso_c + private 4 of" in done.out
    assert "private: each task keeps a residual of rank 4 or less, " in done.out
    found = read_model(tmp_path / "m.safetensors")
    assert isinstance(found, mb.Merged)
    assert same_merged(found, merged(three, "iso_c", private=4))
    refused = mbert("merge", *files, "--method", "iso_c", "--private", "-2", "--out", "n.safetensors", here=tmp_path)
    assert refused.code != 0
    assert "--private: -2" in refused.err
