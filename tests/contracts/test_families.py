"""What every registered family of adapters keeps to."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import attach, attach_extras, fold
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import LowRankOptions
from mergekit_bert.adapters.delta import Delta
from mergekit_bert.adapters.family import FAMILIES, Family, Sites, Size
from mergekit_bert.adapters.file import read_adapter, write_adapter
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.adapters.patch import Patch, check_part
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.folder import FullModel
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import CompositionError, ModelFileError, TrainingError
from mergekit_bert.hardware import generator
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import edit_metadata, random_adapter, same_adapter, same_tensors
from tests.tiny import tiny_rows

SIZES: tuple[Size, ...] = ((12, 8), (8, 12), (9, 9))
OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"rank": rank, "alpha": 5.0, "rank_stabilized": stabilized} for rank in (1, 4) for stabilized in (False, True)
)


@pytest.fixture(params=FAMILIES.names())
def kind(request: pytest.FixtureRequest) -> Family:
    return FAMILIES.get(request.param)


@pytest.fixture(params=[one.name for one in FAMILIES if one.sites])
def sited(request: pytest.FixtureRequest) -> Family:
    """The families that have sites."""
    return FAMILIES.get(request.param)


def sites_of(kind: Family) -> Sites:
    assert kind.sites is not None
    return kind.sites


def weight_of(kind: Family, size: Size) -> Tensor:
    """A frozen weight, for the families that say they need one."""
    if not kind.needs_weight:
        raise AssertionError(f"{kind.name} read the frozen weight, which it says it does not need")
    return torch.randn(size, generator=generator(3))


def own(kind: Family, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options ``given`` that the family has."""
    names = {one.name for one in dataclasses.fields(kind.options)}
    return {name: value for name, value in given.items() if name in names}


def made(kind: Family, options: dict[str, Any], size: Size, seed: int = 0, basis: bool = False) -> dict[str, Tensor]:
    rows = BasisRows(0, 0, options["rank"]).matrix("site", size[1]) if basis else None
    return sites_of(kind).init(
        kind.options(**own(kind, options)), size, rows, partial(weight_of, kind, size), generator(seed)
    )


def delta_of(kind: Family, values: dict[str, Tensor], options: dict[str, Any], size: Size) -> Delta:
    return sites_of(kind).delta(values, kind.options(**own(kind, options)), partial(weight_of, kind, size))


def random_values(kind: Family, options: dict[str, Any], size: Size) -> dict[str, Tensor]:
    source = generator(7)
    return {name: v + torch.randn(v.shape, generator=source) for name, v in made(kind, options, size).items()}


def bases(kind: Family) -> list[str]:
    return ["orthogonal", "random"] if kind.frozen(basis=True) else ["random"]


def test_it_is_a_frozen_record_that_explains_itself(kind: Family) -> None:
    assert kind.description
    assert kind.source
    assert all(rate is None or 0 < rate < 1 for rate in (kind.lr, kind.head_lr))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_it_makes_the_tensors_that_it_names(sited: Family, options: dict[str, Any], size: Size) -> None:
    kind = sited
    for basis in (False, True) if kind.frozen(basis=True) else (False,):
        values = made(kind, options, size, basis=basis)
        shapes = sites_of(kind).shapes(kind.options(**own(kind, options)), size)
        assert {name: tuple(value.shape) for name, value in values.items()} == shapes
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values.values())
        assert kind.frozen(basis) <= shapes.keys()
        for name in kind.frozen(basis):
            assert torch.equal(values[name], BasisRows(0, 0, options["rank"]).matrix("site", size[1]))


def test_a_basis_is_one_of_its_options_only_where_it_has_a_tensor_for_it(kind: Family) -> None:
    for basis in ("orthogonal", "avoid"):
        if kind.frozen(basis=True):
            assert kind.configured({"basis": basis}).basis == basis
        else:
            with pytest.raises(
                TrainingError, match=f"`basis`: an option that `type={kind.name}` does not have; .*; drop `basis`"
            ):
                kind.configured({"basis": basis})


def test_its_options_come_back_from_json(kind: Family) -> None:
    one = kind.configured(own(kind, {"rank": 3, "alpha": 2.0, "alpha_pattern": {"a": 3.0}}))
    two = kind.options.from_json(json.loads(json.dumps(one.to_json())))
    assert two == one
    assert type(two) is kind.options


def test_options_of_another_family_are_taken_where_they_mean_something(kind: Family) -> None:
    assert kind.configured({}, mb.AdapterConfig()) == kind.options()
    given = mb.AdapterConfig(rank=5, basis="random", train_bias=True)
    if issubclass(kind.options, LowRankOptions):
        found = kind.configured({"alpha": 3.0}, given)
        assert (found.rank, found.alpha, found.train_bias) == (5, 3.0, True)
    else:
        with pytest.raises(TrainingError, match=f"`rank`: an option that `type={kind.name}` does not have"):
            kind.configured({}, given)


@pytest.mark.parametrize("size", SIZES)
def test_its_start_follows_from_the_generator_alone(sited: Family, size: Size) -> None:
    kind = sited
    torch.manual_seed(1)
    one = made(kind, OPTIONS[-1], size)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same_tensors(made(kind, OPTIONS[-1], size), one)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_its_delta_has_the_sites_size_and_can_be_trained(sited: Family, options: dict[str, Any], size: Size) -> None:
    kind = sited
    values = random_values(kind, options, size)
    values = {name: value.requires_grad_() for name, value in values.items()}
    delta = delta_of(kind, values, options, size)
    assert delta.shape == size
    delta.dense().square().sum().backward()
    for value in values.values():
        assert value.grad is not None
        assert value.grad.abs().max() > 0


@pytest.mark.parametrize("size", SIZES)
def test_training_starts_at_the_encoder_as_it_is(sited: Family, size: Size) -> None:
    delta = delta_of(sited, made(sited, OPTIONS[-1], size), OPTIONS[-1], size)
    np.testing.assert_allclose(delta.dense(), np.zeros(size), atol=1e-6)


def test_every_trained_tensor_has_a_gradient(kind: Family, bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, kind=kind.name, basis="random")
    model = classifier(bert, adapter.task, adapter.head)
    placed = attach(model, kind.name, adapter.tensors, frozenset(), adapter.config, generator(0))
    if placed:
        model(**bert.tokenizer(["good film", "a cat"], return_tensors="pt")).square().sum().backward()
    for values in placed.values():
        for parameter in values.values():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
    assert bool(placed) == bool(kind.sites)


def test_beside_the_weights_or_folded_into_them_is_the_same(kind: Family, bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, kind=kind.name)
    inputs = bert.tokenizer(["good film", "the cat likes"], padding=True, return_tensors="pt")
    beside = classifier(fold(bert, Patch({}, adapter.shifts, adapter.extras)), adapter.task, adapter.head)
    attach(beside, kind.name, adapter.tensors, frozenset(), adapter.config, generator(0))
    folded = classifier(fold(bert, adapter.part(adapter.name)), adapter.task, adapter.head)
    with torch.no_grad():
        np.testing.assert_allclose(folded(**inputs), beside(**inputs), rtol=1e-4, atol=1e-4)


def test_beside_the_weights_with_dropout_its_delta_alone_sees_it(sited: Family, bert: mb.Encoder) -> None:
    adapter = random_adapter(bert, kind=sited.name, dropout=0.4)
    for site, tensors in list(adapter.tensors.items())[:1]:
        linear = bert.model.get_submodule(site)
        assert isinstance(linear, nn.Linear)
        layer = sites_of(sited).module(linear, tensors, frozenset(), adapter.config, generator(5))
        x = torch.randn(6, linear.in_features, generator=generator(6))
        layer.dropout.train()
        found = layer(x)
        layer.dropout.source.set_state(generator(5).get_state())
        expected = linear(x) + layer.dropout(x) @ adapter.deltas()[site].dense().T
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_it_merges_with_a_lora_into_the_sum_of_their_deltas(kind: Family, bert: mb.Encoder) -> None:
    one = random_adapter(bert, "sst", kind=kind.name, basis="random")
    two = random_adapter(bert, "sts", basis="random", targets="qv")
    merged = mb.merge([one, two], "task_arithmetic", {"sst": 0.5, "sts": -2.0}, base=bert)
    parts = [(0.5, one.deltas()), (-2.0, two.deltas())]
    assert merged.deltas.keys() == {site for _, deltas in parts for site in deltas if not of_the_head(site)}
    for site, delta in merged.deltas.items():
        expected = sum(weight * deltas[site].dense() for weight, deltas in parts if site in deltas)
        np.testing.assert_allclose(delta.dense(), expected, atol=1e-5)


def test_its_file_gives_it_back(kind: Family, bert: mb.Encoder, tmp_path: Path) -> None:
    for basis in bases(kind):
        one = random_adapter(bert, kind=kind.name, basis=basis, train_bias=True)
        write_adapter(tmp_path / "x", one)
        two = read_adapter(tmp_path / "x")
        assert isinstance(two, Adapter)
        assert same_adapter(one, two)
        assert two.needs_base == kind.needs_weight
        check_part("x", two.on(bert).part(two.name), bert)
        write_adapter(tmp_path / "y", two)
        assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_a_file_of_one_that_takes_no_basis_cannot_claim_rows_of_one(
    kind: Family, bert: mb.Encoder, tmp_path: Path
) -> None:
    """Orthogonal merges go by these rows."""
    if kind.frozen(basis=True):
        return
    write_adapter(tmp_path / "x", dataclasses.replace(random_adapter(bert, kind=kind.name), basis=BasisRows(0, 0, 3)))
    with pytest.raises(ModelFileError, match=f"basis rows, which {kind.name} does not use"):
        read_adapter(tmp_path / "x")


def test_it_goes_the_whole_way(kind: Family, bert: mb.Encoder, tmp_path: Path) -> None:
    """Trained, measured, read, in one batch with a LoRA, and as a folder of transformers'."""
    control, few = Control(show=False), mb.TrainConfig(epochs=1, batch_size=8, lr=0.02, precision="fp32")
    adapters = [
        train_adapter(bert, task, tiny_rows(task, 40), tmp_path / f"{task.name}.safetensors", name, None, few, control)
        for task, name in ((mb.get_task("sst"), kind.name), (mb.get_task("sts"), "lora"))
    ]
    one = read_adapter(tmp_path / "sst.safetensors")
    assert same_adapter(one, adapters[0])
    requests = [(task, row) for task in ("sst", "sts") for row in tiny_rows(mb.get_task(task), 6, 5).texts]
    alone = [mb.predictor(one, base=bert).predict(task, [row])[0] for task, row in requests if task == "sst"]
    mixed = mb.predictor(mb.merge([one, adapters[1]], "ensemble", base=bert), base=bert).mixed(requests)[:6]
    for two, three in zip(alone, mixed, strict=True):
        np.testing.assert_allclose(three.outputs, two.outputs, atol=1e-5)
    merged = mb.predictor(mb.merge([one], "fedavg", base=bert), base=bert)
    answers = [merged.predict("sst", [row for task, row in requests if task == "sst"])]
    if not kind.extras:
        (folder,) = mb.export(one, tmp_path / "dense", base=bert)
        answers.append(mb.predictor(mb.load(folder)).predict("sst", [row for task, row in requests if task == "sst"]))
    for found in answers:
        for two, three in zip(alone, found, strict=True):
            np.testing.assert_allclose(three.outputs, two.outputs, atol=1e-5)
    grams = collect("gram", bert, [one.on(bert).part("sst")], [tiny_rows(mb.get_task("sst"), 8)])
    assert all(bool(gram.dense().isfinite().all()) for gram in grams.values())


@pytest.fixture
def added(kind: Family) -> Family:
    """A family that has extras."""
    if not kind.extras:
        pytest.skip("it adds nothing")
    return kind


def trained_extras(kind: Family, encoder: mb.Encoder, options: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {one.name: one.init(kind.options(**options), encoder, generator(0)) for one in kind.extras}


EXTRAS: tuple[dict[str, Any], ...] = (
    *({"length": length, "projection": projection} for length in (1, 5) for projection in (False, True)),
    *({"length": 5, "place": place} for place in ("before", "after")),
)


@pytest.mark.parametrize("given", EXTRAS)
def test_it_trains_and_keeps_the_extras_that_it_names(
    added: Family, bert: mb.Encoder, given: dict[str, Any], tmp_path: Path
) -> None:
    own = {one.name for one in dataclasses.fields(added.options)}
    given = {name: value for name, value in given.items() if name in own}
    torch.manual_seed(1)
    trained, state = trained_extras(added, bert, given), torch.random.get_rng_state()
    for extra in added.extras:
        assert same_tensors(extra.init(added.options(**given), bert, generator(0)), trained[extra.name])
        size = extra.size(bert)
        kept = extra.kept(size, trained[extra.name])
        shapes = {name: tuple(value.shape) for name, value in kept.items()}
        assert shapes == extra.shapes(added.options(**given), size)
        assert extra.size_of(shapes) == size
        assert extra.virtual(shapes).total == given["length"]
    assert torch.equal(torch.random.get_rng_state(), state)
    adapter = random_adapter(bert, kind=added.name, **given)
    tokens = adapter.part("sst").tokens(bert, tiny_rows(adapter.task, 4))
    model = classifier(bert, adapter.task, adapter.head)
    placed = attach_extras(model.encoder, trained)
    parameters = [one.requires_grad_(True) for values in placed.values() for one in values.values()]
    outputs_of(model, tokens.batch([0, 1, 2, 3])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_its_extras_stay_each_tasks_own_in_a_merge(added: Family, bert: mb.Encoder, tmp_path: Path) -> None:
    """Beside whatever else is merged; with a LoRA among the inputs, and in a merge of merges."""
    one, two = (random_adapter(bert, task, kind=added.name, basis="random") for task in ("sst", "sts"))
    lora = random_adapter(bert, "para", basis="random")
    merged = mb.merge([mb.merge([one, two], "fedavg"), lora], "fedavg", keep_inputs=False)
    mb.save(merged, tmp_path / "m.safetensors")
    read = mb.load(tmp_path / "m.safetensors")
    assert isinstance(read, mb.Merged)
    for adapter in (one, two):
        found = read.own[adapter.name].extras
        assert found.keys() == adapter.extras.keys()
        assert all(same_tensors(found[name], adapter.extras[name]) for name in found)
    assert read.own["para"].extras == {}
    requests = [(task, row) for task in ("sst", "para", "sts") for row in tiny_rows(mb.get_task(task), 5, 5).texts]
    predictor = mb.predictor(read, base=bert)
    alone = [predictor.predict(task, [row])[0] for task, row in requests]
    for single, together in zip(alone, predictor.mixed(requests), strict=True):
        np.testing.assert_allclose(together.outputs, single.outputs, atol=1e-5)
    private = mb.merge([one, lora], "fedavg", private=2)
    assert same_tensors(*(value.extras[added.extras[0].name] for value in (private.own["sst"], one)))


def test_a_folder_of_transformers_has_no_place_for_its_extras(added: Family, bert: mb.Encoder, tmp_path: Path) -> None:
    one, name = random_adapter(bert, kind=added.name), added.extras[0].name
    for place, model in enumerate((one, mb.merge([one, random_adapter(bert, "sts")], "fedavg"))):
        with pytest.raises(CompositionError, match=f"a {name}; expected weights alone"):
            mb.export(model, tmp_path / "dense", base=bert)
        mb.save(model, tmp_path / f"{place}.safetensors")
        with pytest.raises(CompositionError, match=rf"a {name}( beside its Deltas)?; expected Deltas and shifts alone"):
            mb.convert(tmp_path / f"{place}.safetensors", "peft", tmp_path / "peft", base=bert)
        assert not (tmp_path / "dense").exists()
        assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("spoil", ["none", "more", "other", "wider", "longer"])
def test_a_file_whose_extras_are_not_those_of_its_options_is_refused(
    added: Family, bert: mb.Encoder, tmp_path: Path, spoil: str
) -> None:
    write_adapter(tmp_path / "x", random_adapter(bert, kind=added.name))

    def change(metadata: dict[str, Any]) -> None:
        record = metadata["adapter"]
        name = added.extras[0].name
        size = record["extras"][name]
        if spoil == "none":
            del record["extras"]
        elif spoil == "more":
            record["extras"]["lora"] = [1]
        elif spoil == "other":
            record["type"], record["config"] = "probe", mb.AdapterConfig().to_json()
        elif spoil == "wider":
            record["extras"][name] = [*size[:-1], 2**31]
        else:
            record["config"]["length"] += 1

    edit_metadata(change)(tmp_path / "x")
    with pytest.raises(ModelFileError):
        read_adapter(tmp_path / "x")


def test_without_its_base_it_gives_its_deltas_or_says_what_it_needs(kind: Family, bert: mb.Encoder) -> None:
    one = dataclasses.replace(random_adapter(bert, kind=kind.name), weights=None)
    if not kind.needs_weight:
        assert one.deltas().keys() == one.sites.keys()
        assert one.on(bert) is one
        return
    with pytest.raises(CompositionError, match="base's weights"):
        one.deltas()
    for site, delta in one.on(bert).deltas().items():
        assert delta.shape == one.sites[site]


def test_options_of_its_own_come_back_from_every_file(
    bert: mb.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Options(mb.AdapterConfig):
        inner: int = 2

    monkeypatch.setitem(
        FAMILIES._added, "inner", dataclasses.replace(FAMILIES.get("lora"), name="inner", options=Options)
    )
    adapter = random_adapter(bert, "sst", kind="inner", inner=5)
    merged = mb.merge([adapter, random_adapter(bert, "sts", start=3)], "fedavg", keep_inputs=True)
    mb.save(adapter, tmp_path / "a.safetensors")
    mb.save(merged, tmp_path / "m.safetensors")
    mb.export(adapter, tmp_path / "dense", base=bert)
    read, kept = mb.load(tmp_path / "a.safetensors"), mb.load(tmp_path / "m.safetensors")
    assert isinstance(read, Adapter)
    assert isinstance(kept, mb.Merged)
    assert read.config == kept.kept["sst"].config == adapter.config
    whole = mb.load(tmp_path / "dense" / "sst")
    assert isinstance(whole, FullModel)
    assert whole.record["config"]["inner"] == 5
    monkeypatch.delitem(FAMILIES._added, "inner")
    for path in ("a.safetensors", "m.safetensors", "dense/sst"):
        with pytest.raises(ModelFileError, match="adapter type: 'inner'; expected one of bitfit, "):
            mb.load(tmp_path / path)
