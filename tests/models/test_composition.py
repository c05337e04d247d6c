"""Every model keeps to one protocol, and every format gives back what it was given."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.attach import fold, patched
from mergekit_bert.adapters.delta import apply
from mergekit_bert.composing.merge_input import MergeInput, inputs_of
from mergekit_bert.errors import CompositionError
from mergekit_bert.files import file_fingerprint
from mergekit_bert.formats.format import FORMATS, format_of, open_model
from mergekit_bert.models.composition import Composition, Model, as_composition
from mergekit_bert.models.prediction import Predictor
from tests.composing.helpers import merge, merged, trio
from tests.tiny import tiny_rows

NAMES = ("adapter", "merged", "ensemble", "folder")


@pytest.fixture(scope="module")
def three(bert: mb.Encoder) -> list[Adapter]:
    return trio(bert, targets="qv", train_layernorm=True)


@pytest.fixture(scope="module")
def models(bert: mb.Encoder, three: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    FORMATS["hf"].write(folder, three[0], lambda: bert, False)
    return {
        "adapter": three[0],
        "merged": merged(three, "fedavg", rank=2, private=1),
        "ensemble": merge(three, "ensemble"),
        "folder": open_model(folder / three[0].name),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_model_keeps_to_the_protocol(models: dict[str, Any], bert: mb.Encoder, name: str) -> None:
    model = models[name]
    assert isinstance(model, Model)
    assert model.base.fingerprint == bert.fingerprint
    assert model.on(bert).tasks == model.tasks
    assert model.seen() == []
    assert set(model.described()["parts"]) == {task.name for task in model.tasks}


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_part_is_what_is_shared_and_its_own(models: dict[str, Any], bert: mb.Encoder, name: str) -> None:
    model, weights = models[name], bert.weights
    for task in model.tasks:
        own, part = model.own_part(task.name), model.part(task.name)
        whole = fold(bert, part).weights
        for place in weights:
            twice = patched(place, patched(place, weights[place], model.shared), own)
            assert torch.allclose(twice, whole[place], atol=1e-6)
        for site, delta in own.deltas.items():  # the sum, made another way
            shared = model.shared.deltas[site].dense() if site in model.shared.deltas else 0
            exact = weights[f"{site}.weight"] + shared + delta.dense()
            assert torch.allclose(apply(weights[f"{site}.weight"], part.deltas[site]), exact, atol=1e-6)


def test_only_a_merge_shares(models: dict[str, Any]) -> None:
    sharing = [name for name in NAMES[:3] if models[name].shared.deltas or models[name].shared.shifts]
    assert sharing == ["merged"]


def test_the_sha256_of_an_adapter_is_that_of_its_file(models: dict[str, Any], tmp_path: Path) -> None:
    mb.save(models["adapter"], tmp_path / "x.safetensors")
    sha256 = file_fingerprint(tmp_path / "x.safetensors")
    assert [models[name].sha256() for name in NAMES] == [sha256, None, None, None]
    assert [models[name].sha256_of("sst") for name in NAMES] == [sha256, sha256, sha256, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gives_its_tasks_to_a_merge(models: dict[str, Any], bert: mb.Encoder, name: str) -> None:
    inputs = inputs_of(models[name], base=bert) if name != "folder" else inputs_of(models[name])
    assert [task for one in inputs for task in one.parts] == [task.name for task in models[name].tasks]
    assert [one.adapter is not None for one in inputs] == {"adapter": [True], "ensemble": [True] * 3}.get(name, [False])
    assert all(inputs_of(one) == [one] for one in inputs)


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_gives_back_what_it_was_given(
    models: dict[str, Any], bert: mb.Encoder, tmp_path: Path, form: str
) -> None:
    adapter, (task,) = models["adapter"], models["adapter"].tasks
    (path,) = FORMATS[form].write(tmp_path / "x.safetensors", adapter, lambda: bert, False)
    assert format_of(path).name == form
    again, some = open_model(path, bert), tiny_rows(task, 4)
    expected = Predictor(adapter, bert).outputs(task.name, some)
    assert [one.to_json() for one in again.tasks] == [task.to_json()]
    assert Predictor(again, bert).outputs(task.name, some) == pytest.approx(expected, abs=1e-5)
    (one,) = FORMATS[form].inputs(path, bert, lambda name: bert)
    assert isinstance(one, MergeInput)
    site = next(iter(one.deltas))
    assert torch.allclose(one.deltas[site].dense(), adapter.deltas()[site].dense(), atol=1e-6)


def test_a_whole_model_is_no_composition(models: dict[str, Any]) -> None:
    compositions: list[Composition] = [as_composition(models[name], name) for name in NAMES[:3]]
    assert compositions == [models[name] for name in NAMES[:3]]
    with pytest.raises(CompositionError, match="it: a whole model"):
        as_composition(models["folder"], "it")
