"""Recipes: written and read back, checked with line and key, weights by layer, rank, and a change of mind."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.file import write_adapter
from mergekit_bert.composing.merge_input import of_adapter
from mergekit_bert.composing.recipe import Recipe, read_recipe, write_recipe
from mergekit_bert.errors import CompositionError, MbertError, UnknownNameError
from mergekit_bert.models.composition import Merged
from mergekit_bert.schema import SchemaError
from tests.adapters.helpers import dense64, quick, same_adapter
from tests.composing.helpers import LINEAR, merged, trio
from tests.hang import HANGS, in_time

NAMES = st.text("abcdefgh", min_size=1, max_size=6)
WEIGHTS = st.dictionaries(NAMES, st.floats(-9, 9), max_size=3)
RECIPES = st.fixed_dictionaries(
    {
        "method": NAMES,
        "space": st.sampled_from(["full", "core"]),
        "options": st.dictionaries(NAMES, st.floats(-9, 9) | st.booleans() | NAMES, max_size=3),
        "weights": WEIGHTS,
        "layers": st.dictionaries(st.sampled_from([r"encoder\.layer\.0\..*", ".*", "a|b"]), WEIGHTS, max_size=2),
        "rank": st.none() | st.integers(1, 99),
        "seed": st.integers(0, 2**31),
        "inputs": st.lists(NAMES, max_size=3),
    }
)


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv", train_bias=True)


@quick
@given(fields=RECIPES)
def test_a_recipe_comes_back_from_yaml_and_from_json(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**fields)
    write_recipe(tmp_path / "r.yml", recipe)
    assert read_recipe(tmp_path / "r.yml") == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert list(read_recipe(tmp_path / "r.yml").layers) == list(recipe.layers), "their order counts"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: ties\nspaze: core\n", r"r.yml, line 2: an unknown key 'spaze'; expected one of inputs, layers"),
        ("method: ties\n\nrank: high\n", r"r.yml, line 3, key 'rank': 'high'; expected a whole number"),
        ("rank: true\n", r"line 1, key 'rank'"),
        ("weights: {sst: much}\n", r"line 1, key 'weights.sst': 'much'; expected a number"),
        ("weights: [1]\n", r"line 1, key 'weights'"),
        ("layers:\n  'a(': {sst: 1}\n", r"line 1, key 'layers': 'a\(' .*; expected patterns of whole"),
        ("layers: {a: 1}\n", r"line 1, key 'layers.a': 1; expected a mapping"),
        ("layers: {a: {b: true}}\n", r"line 1, key 'layers.a.b': True; expected a number"),
        ("method: [a\nspace: b\n", r"r.yml, line 2: not YAML"),
        ("- method\n", r"r.yml: not a mapping"),
        ("", r"r.yml: not a mapping"),
        ("inputs: a\n", r"key 'inputs': 'a'; expected a list"),
        ("options: [1]\n", r"key 'options': \[1\]; expected a mapping"),
        ("options: {a: [1]}\n", r"key 'options.a': \[1\]; expected a number, a text, true or false"),
        ("options: {a: }\n", r"key 'options.a': None; expected a number, a text, true or false"),
        ("method: 3\n", r"key 'method': 3; expected a text"),
        ("seed: 0.5\n", r"key 'seed': 0.5; expected a whole number"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(CompositionError, match=message) as caught:
        read_recipe(tmp_path / "r.yml")
    assert "\n" not in str(caught.value)


FAR = 10**400
HOSTILE: dict[str, tuple[str, str]] = {
    "laughs": ("method: &a [x]\nspace: [*a, *a]", r"line 1: an anchor or alias; expected a recipe in plain YAML"),
    "brackets": ("method: " + "[" * 60_000, r"line 1: nested more than 64 deep; "),
    "digits": ("\nrank: " + "9" * 4300, r"line 2: a number of 4,300 digits; "),
    "a far weight": (f"weights:\n  sst: {FAR}", r"line 2: a number of 401 digits; "),
    "a large weight": (
        "weights: {sst: 1.0e+300}",
        r"key 'weights.sst': 1e\+300; expected less than or equal to 1000000",
    ),
    "an endless weight": ("weights: {sst: .inf}", r"line 1: .inf, which is no number; "),
    "no number": ("weights: {sst: .nan}", r"line 1: .nan, which is no number; "),
    "a large weight of a layer": ("layers: {a: {sst: -1000001}}", r"key 'layers.a.sst': -1000001; expected greater"),
    "a large rank": ("rank: 65537", r"key 'rank': 65537; expected less than or equal to 65536"),
    "a large residual": ("private: 9999999999", r"key 'private': 9999999999; expected less than or equal to 65536"),
    "a negative rank": ("rank: -1", r"key 'rank': -1; expected greater than or equal to 0"),
    "a far seed": ("seed: 99999999999999999999", r"key 'seed': 9+; expected less than"),
    "a date": ("seed: 2020-13-45", r"key 'seed': '2020-13-45'; expected a whole number"),
    "a steering name": ('method: "a\\e[2J"', r"key 'method': 'a\\x1b\[2J'; expected no control characters"),
    "a steering key": ('weights: {"a\\e[2J": 1}', r"key 'weights.a\\x1b\[2J.\[key\]'"),
    "a long name": ("method: " + "x" * 60_000, r"key 'method': 'x+\.\.\.x+'; expected at most 10000 characters"),
    "a pattern too large": ("layers: {'((a{100}){100}){100}': {}}", r"line 1, key 'layers': "),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_recipe_is_one_quick_line(tmp_path: Path, case: str) -> None:
    text, message = HOSTILE[case]
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(CompositionError, match=message) as caught:
        read_recipe(tmp_path / "r.yml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize(
    "change",
    [{"rank": "2"}, {"weights": {"a": "1"}}, {"layers": [["a"]]}, {"layers": [["a", {}], ["a", {}]]}, {"x": 1}],
)
def test_a_record_of_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        Recipe.from_json(Recipe("ties").to_json() | change)


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="no such file"):
        read_recipe(tmp_path / "none.yml")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CompositionError, match="no text in UTF-8"):
        read_recipe(tmp_path / "bytes.yml")


@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        (Recipe("tise"), UnknownNameError, "did you mean 'ties'"),
        (Recipe("ties", "cor"), UnknownNameError, "space: 'cor'; .*did you mean 'core'"),
        (Recipe("regmean", "core"), CompositionError, "`space=core`: regmean is not defined there; expected one of"),
        (Recipe("ties", options={"density": 2}), CompositionError, "option 'density' of ties: 2; expected a number"),
        (Recipe("ties", options={"dense": 2}), UnknownNameError, "option of ties: 'dense'"),
        (Recipe("fedavg", options={"density": 2}), CompositionError, "no such option; expected no options"),
        (Recipe("fedavg", rank=0), CompositionError, "`rank`: 0; expected a whole number from 1 to 65536"),
        (Recipe("fedavg", rank=10**400), CompositionError, "`rank`: 10+…; expected a whole number from 1 to 65536"),
        (Recipe("fedavg", private=-1), CompositionError, "`private`: -1; expected a whole number from 0 to 65536"),
        (Recipe("fedavg", seed=10**400), CompositionError, "`seed`: 10+…; expected a whole number from 0 to"),
        (Recipe("fedavg", weights={"sst": math.inf}), CompositionError, "`weights`: 'sst=inf'; expected a finite"),
        (Recipe("fedavg", weights={"sst": 2.0e6}), CompositionError, r"`weights`: 'sst=2000000.0'; expected .* within"),
        (
            Recipe("fedavg", layers={".*": {"sst": math.nan}}),
            CompositionError,
            "layers, '.*': 'sst=nan'; expected a fi",
        ),
        (Recipe("fedavg", rank=99), CompositionError, "`rank=99`: site .* is 32 × 32; expected at most 32"),
        (Recipe("fedavg", layers={"layer.*": {}}), CompositionError, "layers, 'layer.*': no site matches it"),
        (Recipe("fedavg", layers={"a)|(b": {}}), CompositionError, r"layers: 'a\)\|\(b' \(unbalanced parenthesis"),
        (Recipe("fedavg", layers={"(?=a)": {}}), CompositionError, "layers: .*neither lookaround nor backreferences"),
        (Recipe("fedavg", layers={f"{n}": {} for n in range(3000)}), CompositionError, "layers: too many patterns"),
        (Recipe("fedavg", layers={".*": {"cola": 1.0}}), CompositionError, "layers, '.*': 'cola'; expected names"),
        (Recipe("distill", layers={".*": {"sst": 1.0}}), CompositionError, "layers: weights by layer for distill"),
        (Recipe("ensemble", rank=3), CompositionError, "`method=ensemble`: a rank or space"),
        (Recipe("ensemble", options={"a": 1}), CompositionError, "options for an ensemble"),
    ],
)
def test_what_cannot_be_done_is_told(
    three: list[Adapter], recipe: Recipe, kind: type[MbertError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        mb.merge(three, recipe)


def test_a_layer_pattern_that_would_hang_does_not(three: list[Adapter]) -> None:
    with in_time(), pytest.raises(CompositionError, match="no site matches it"):
        mb.merge(three, Recipe("fedavg", layers={HANGS: {}}))
    with in_time():
        assert Recipe(layers={HANGS: {"sst": 2.0}}).at("encoder.layer.0.attention.self.query", {"sst": 1.0}) == {
            "sst": 1.0
        }


def test_weights_by_layer_hold_there_and_the_last_match_counts(three: list[Adapter]) -> None:
    layers = {r"encoder\.layer\.0\..*": {"sst": 0.0, "sts": 3.0}, r".*\.0\..*query": {"sst": -2.0}}
    model = merged(three, "task_arithmetic", {"sst": 1.0, "sts": 0.5, "para": 1.0}, layers=layers)
    exact = {one.name: dense64(one) for one in three}
    for site, delta in model.deltas.items():
        weights = {"sst": 1.0, "sts": 0.5, "para": 1.0}
        if ".layer.0." in site:
            weights |= {"sst": -2.0 if site.endswith("query") else 0.0, "sts": 3.0}
        total = sum(weight * exact[name][site] for name, weight in weights.items())
        np.testing.assert_allclose(delta.dense(), total, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_rank_gives_the_best_of_that_rank_and_tells_what_is_lost(three: list[Adapter], rank: int) -> None:
    whole, small = merged(three, "task_arithmetic"), merged(three, "task_arithmetic", rank=rank)
    lost = small.trace["lost"]
    gone = energy = 0.0
    for site, delta in small.deltas.items():
        values = torch.linalg.svdvals(whole.deltas[site].dense().double())
        assert int(torch.linalg.matrix_rank(delta.dense().double(), rtol=1e-5)) <= rank
        apart = float((delta.dense() - whole.deltas[site].dense()).double().square().sum())
        assert apart == pytest.approx(float(values[rank:].square().sum()), abs=1e-6)
        share = float(values[rank:].square().sum() / values.square().sum())
        assert lost["sites"][site] == pytest.approx(share, abs=1e-6)
        gone, energy = gone + apart, energy + float(values.square().sum())
    assert lost["in_all"] == pytest.approx(gone / energy, abs=1e-6)


def kept(three: list[Adapter], path: Path, method: str, **options: object) -> Path:
    mb.save(mb.merge(three, method, keep_inputs=True, **options), path)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("method", [*LINEAR, "ties"])
def test_added_and_removed_is_as_merged_afresh_to_the_bit(three: list[Adapter], tmp_path: Path, method: str) -> None:
    first = kept(three[:2], tmp_path / "two.safetensors", method)
    write_adapter(tmp_path / "para.safetensors", three[2])
    inputs, recipe = mb.changed_inputs([first], [tmp_path / "para.safetensors"], ["sst"])
    found = mb.merge(inputs, recipe, keep_inputs=True)
    mb.save(found, tmp_path / "changed.safetensors")
    afresh = kept(three[1:], tmp_path / "afresh.safetensors", method)
    assert (tmp_path / "changed.safetensors").read_bytes() == afresh.read_bytes()


def test_given_weights_are_kept_and_those_of_the_removed_go(three: list[Adapter], tmp_path: Path) -> None:
    layers = {".*query": {"sst": 2.0, "sts": 0.25}}
    path = kept(three, tmp_path / "a.safetensors", "fedavg", weights={"sst": 0.5, "sts": 0.75}, layers=layers)
    inputs, recipe = mb.changed_inputs([path], [], ["sst"])
    assert [one.name for one in inputs] == ["sts", "para"]
    assert (recipe.weights, recipe.layers) == ({"sts": 0.75}, {".*query": {"sts": 0.25}})
    assert all(same_adapter(one.adapter, other) for one, other in zip(inputs, three[1:], strict=True))


def test_a_merged_file_keeps_its_inputs_only_when_asked(three: list[Adapter], tmp_path: Path) -> None:
    plain = merged(three, "fedavg")
    mb.save(plain, tmp_path / "plain.safetensors")
    assert not plain.kept
    for add, remove, path, message in (
        ([], ["sst"], "plain", "a file without its inputs; expected one merged with `keep_inputs`"),
        ([], ["cola"], "kept", "`remove`: 'cola'; expected one of sst, sts, para"),
    ):
        kept_path = tmp_path / f"{path}.safetensors"
        if not kept_path.exists():
            kept(three, kept_path, "fedavg")
        with pytest.raises(CompositionError, match=re.escape(message.split(";")[0])):
            mb.changed_inputs([kept_path], add, remove)
    with pytest.raises(CompositionError, match="2 files; expected one merged file"):
        mb.changed_inputs([tmp_path / "a", tmp_path / "b"], [], ["sst"])
    write_adapter(tmp_path / "sst.safetensors", three[0])
    with pytest.raises(CompositionError, match="not merged"):
        mb.changed_inputs([tmp_path / "sst.safetensors"], [], ["sst"])


def test_kept_inputs_must_be_adapters(three: list[Adapter]) -> None:
    model = merged(three[:2], "fedavg")
    assert isinstance(model, Merged)
    with pytest.raises(CompositionError, match=r"`keep_inputs`: 'sst\+sts' is not a single adapter"):
        mb.merge([model, three[2]], "task_arithmetic", keep_inputs=True)


def test_the_file_carries_its_recipe(three: list[Adapter], tmp_path: Path) -> None:
    model = merged(three, "ties", {"sst": 0.5}, space="core", options={"density": 0.5}, seed=3)
    mb.save(model, tmp_path / "m.safetensors")
    again = mb.load(tmp_path / "m.safetensors")
    assert isinstance(again, Merged)
    recipe = Recipe.from_json(again.recipe)
    assert (recipe.method, recipe.space, recipe.options, recipe.seed) == ("ties", "core", {"density": 0.5}, 3)
    once_more = mb.merge(three, recipe)
    assert isinstance(once_more, Merged)
    for site, delta in again.deltas.items():
        assert torch.equal(once_more.deltas[site].dense(), delta.dense())


def test_a_merged_model_is_an_input_with_all_its_tasks(three: list[Adapter]) -> None:
    pair = merged(three[:2], "task_arithmetic", {"sst": 1.0, "sts": -0.5})
    both = mb.merge([pair, three[2]], "task_arithmetic", {"sst+sts": 2.0, "para": 1.0})
    assert isinstance(both, Merged)
    assert [task.name for task in both.tasks] == ["sst", "sts", "para"]
    exact = merged(three, "task_arithmetic", {"sst": 2.0, "sts": -1.0, "para": 1.0})
    for site, delta in both.deltas.items():
        np.testing.assert_allclose(delta.dense(), exact.deltas[site].dense(), atol=2e-5)
    assert all(dataclasses.asdict(of_adapter(one))["parts"][one.name] == both.parts[one.name] for one in three)


def test_a_weight_beyond_all_measure_and_a_key_twice_are_told(three: list[Adapter], tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"`weights`: 'sst=1e\+300'; expected a number within ±1e\+06"):
        merged(three, "ties", {"sst": 1e300})
    (tmp_path / "r.yml").write_text("method: ties\nmethod: dare\n")
    with pytest.raises(CompositionError, match=r"r.yml, line 2: the key 'method' again"):
        read_recipe(tmp_path / "r.yml")


def test_where_the_inputs_lay_is_not_in_the_file(three: list[Adapter], tmp_path: Path) -> None:
    for name, inputs in (("a", ()), ("b", ("here/x", "there/y"))):
        mb.save(mb.merge(three, Recipe("ties", inputs=inputs)), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
