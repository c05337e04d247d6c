"""Sums of families: what they change, their options, and which are refused; and the families that change no weight."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.config import AdapterConfig, Options
from mergekit_bert.adapters.family import FAMILIES, sum_of
from mergekit_bert.encoder.sites import shift_names
from mergekit_bert.errors import CompositionError, MbertError, TrainingError, UnknownNameError
from mergekit_bert.formats.peft_format import read_peft, write_peft
from mergekit_bert.option import option
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import random_adapter, same_adapter
from tests.tiny import tiny_rows
from tests.training.runs import train

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

EVERY = "lora+bitfit+layernorm"
REFUSED: dict[str, tuple[str, type[MbertError], str]] = {
    "two that adapt layers": ("lora+dora", TrainingError, "dora and lora, which both adapt linear layers"),
    "one twice": ("bitfit+lora+bitfit", TrainingError, "`type=lora\\+bitfit\\+bitfit`: a part that comes twice"),
    "a head alone": ("lora+probe", TrainingError, "probe, which changes nothing of the encoder"),
    "an unknown part": ("lora+bitfot", UnknownNameError, "'bitfot'.*did you mean 'bitfit'"),
    "an empty part": ("lora+", UnknownNameError, "adapter type: ''"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sums_that_cannot_be_are_refused_in_one_line(name: str) -> None:
    kind, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        FAMILIES.get(kind)
    assert "\n" not in str(caught.value)


def test_a_sum_is_the_same_in_every_order() -> None:
    one = FAMILIES.get("layernorm+bitfit+lora")
    assert one is FAMILIES.get("lora + bitfit+layernorm")
    assert one.name == EVERY
    assert one.sites is FAMILIES.get("lora").sites
    assert one.options is AdapterConfig


def test_its_options_are_those_of_its_parts() -> None:
    @dataclass(frozen=True)
    class Long(Options):
        recorded: ClassVar = {"depth": 2}
        length: int = option(5, "How long.")

    long = dataclasses.replace(FAMILIES.get("bitfit"), name="long", options=Long)
    both = sum_of([long, FAMILIES.get("dora")])
    config = both.configured({"length": 7, "rank": 3})
    assert isinstance(config, Long)
    assert isinstance(config, FAMILIES.get("dora").options)
    assert (config.length, config.rank, config.at("x").length) == (7, 3, 7)
    assert config.to_json()["basis"] == "random"
    assert config.to_json()["depth"] == 2
    assert both.options.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(TrainingError, match=r"`basis`: an option that `type=dora\+long` does not have"):
        both.configured({"basis": "orthogonal"})


def test_a_sum_shifts_what_its_parts_shift_in_the_encoders_order(bert: mb.Encoder) -> None:
    family = FAMILIES.get(EVERY)
    assert family.shifts is not None
    expected = shift_names(bert.model, bias=True, layernorm=True)
    assert family.shifted(family.options(), bert.model) == expected
    lora = FAMILIES.get("lora")
    assert lora.shifted(lora.options(train_bias=True, train_layernorm=True), bert.model) == expected


def test_lora_and_bitfit_train_what_lora_with_biases_trains(bert: mb.Encoder, tmp_path: Path) -> None:
    options = {"rank": 2, "basis": "random"}
    one = train(bert, tmp_path / "a", kind="bitfit+lora", adapter=mb.AdapterConfig(**options), epochs=1)
    two = train(bert, tmp_path / "b", kind="lora", adapter=mb.AdapterConfig(**options, train_bias=True), epochs=1)
    assert one.type == "lora+bitfit"
    assert one.shifts.keys() == two.shifts.keys()
    assert all(torch.equal(one.shifts[name], two.shifts[name]) for name in one.shifts)
    assert all(torch.equal(one.tensors[site]["B"], two.tensors[site]["B"]) for site in one.tensors)
    assert one.trainable() == two.trainable()


@pytest.mark.parametrize("kind", [EVERY, "dora+layernorm", "bitfit+layernorm"])
def test_a_sum_is_trained_read_merged_and_mixed(bert: mb.Encoder, tmp_path: Path, kind: str) -> None:
    one = train(bert, tmp_path / "sum.safetensors", kind=kind, epochs=1)
    read = mb.load(tmp_path / "sum.safetensors")
    assert isinstance(read, Adapter)
    assert read.type == kind
    assert same_adapter(read, one)
    assert all(bool(shift.any()) for name, shift in one.shifts.items() if "key" not in name)  # softmax is blind to it
    lora = train(bert, tmp_path / "sts.safetensors", task="sts", epochs=1)
    merged = mb.merge([read, lora], "task_arithmetic", base=bert, weights={"sst": 1.0, "sts": 0.0})
    rows = tiny_rows(mb.get_task("sst"), 5).texts
    alone = mb.predictor(read, base=bert).predict("sst", rows)
    for found in (mb.predictor(merged, base=bert), mb.predictor(mb.merge([read, lora], "ensemble"), base=bert)):
        for first, second in zip(alone, found.predict("sst", rows), strict=True):
            np.testing.assert_allclose(second.outputs, first.outputs, atol=1e-5)


def test_what_the_base_has_none_of_is_refused_before_any_work(encoders: dict[str, mb.Encoder], tmp_path: Path) -> None:
    task = mb.get_task("sst")
    with pytest.raises(
        TrainingError, match=r"no layer that `type=bitfit` can adapt; expected the biases of the linear"
    ):
        train_adapter(encoders["modernbert"], task, tiny_rows(task, 20), tmp_path / "a.safetensors", "bitfit")
    assert list(tmp_path.iterdir()) == []


def test_norms_alone_become_a_folder_that_peft_loads_and_come_back(
    bert: mb.Encoder, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    one = random_adapter(bert, kind="layernorm")
    write_peft(tmp_path / "p", one, bert)
    assert json.loads((tmp_path / "p/adapter_config.json").read_text())["peft_type"] == "LN_TUNING"
    check_back(tmp_path / "p", bert, one)
    (tmp_path / "p/mbert.json").unlink()
    task = dataclasses.replace(one.task, hub=None)
    bare = read_peft(tmp_path / "p", bert, task)
    assert isinstance(bare, Adapter)
    assert bare.type == "layernorm"
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert"], num_labels=task.outputs)
    given = bert.tokenizer(["good film", "a cat"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "p").eval()(**given).logits
    found = mb.predictor(one, base=bert).predict("sst", [("good film",), ("a cat",)])
    np.testing.assert_allclose([row.outputs for row in found], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["loha", "loha+layernorm", EVERY, "lora+layernorm"])
def test_what_peft_has_a_place_for_comes_back(bert: mb.Encoder, tmp_path: Path, kind: str) -> None:
    one = random_adapter(bert, kind=kind, alpha_pattern={"query": 2.0})
    write_peft(tmp_path / "p", one, bert)
    check_back(tmp_path / "p", bert, one)


def check_back(path: Path, encoder: mb.Encoder, one: Adapter) -> None:
    """The folder gives the adapter: values saved whole up to the rounding of their difference from the base's."""
    found = read_peft(path, encoder)
    assert isinstance(found, Adapter)
    assert found.shifts.keys() == one.shifts.keys()
    for name, shift in one.shifts.items():
        np.testing.assert_allclose(found.shifts[name], shift, atol=1e-6)
    assert same_adapter(dataclasses.replace(found, shifts=one.shifts), one)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bitfit", {}, "type bitfit, which PEFT does not have"),
        ("bitfit+layernorm", {}, "type bitfit\\+layernorm, which PEFT does not have"),
        ("loha+bitfit", {}, "biases beside loha\\+bitfit, which PEFT has for LoRA alone"),
        ("loha", {"rank_stabilized": True}, "a loha with rank_stabilized"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(
    bert: mb.Encoder, tmp_path: Path, kind: str, options: dict[str, bool], message: str
) -> None:
    with pytest.raises(CompositionError, match=message):
        write_peft(tmp_path / "p", random_adapter(bert, kind=kind, **options), bert)
    assert not (tmp_path / "p").exists()


def test_options_by_name_are_those_of_the_family(bert: mb.Encoder) -> None:
    rows = {"sentence": ["good", "bad"] * 10, "label": [1, 0] * 10}
    with pytest.raises(TrainingError, match="`rank`: an option that `type=bitfit` does not have; expected no options"):
        mb.train_adapter("sst", rows, base=bert, type="bitfit", rank=3)
    with pytest.raises(UnknownNameError, match="did you mean 'rank'"):
        mb.train_adapter("sst", rows, base=bert, type="loha", rnk=3)


def test_the_share_that_is_trained_is_described(bert: mb.Encoder, tmp_path: Path) -> None:
    one = train(bert, tmp_path / "a.safetensors", kind="bitfit", epochs=1)
    count = sum(tensor.numel() for tensor in (*one.shifts.values(), *one.head.values()))
    told = mb.describe(tmp_path / "a.safetensors")
    total = sum(p.numel() for p in bert.model.parameters()) + sum(tensor.numel() for tensor in one.head.values())
    assert (told["trainable"], told["total"]) == (count, total)
    assert told["reduction_percent"] == pytest.approx(100 * (1 - count / total), abs=1e-3)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    alone = mb.describe(tmp_path / "b.safetensors")
    assert alone["trainable"] == count
    assert "total" not in alone


def test_frozen_rows_are_not_counted_as_trained(bert: mb.Encoder) -> None:
    fixed, free = (random_adapter(bert, basis=basis) for basis in ("orthogonal", "random"))
    rows = sum(tensors["A"].numel() for tensors in fixed.tensors.values())
    assert free.trainable() - fixed.trainable() == rows
