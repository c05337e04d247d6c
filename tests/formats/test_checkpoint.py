"""Whole checkpoints as inputs: what brute force gives, few tensors at a time, and refused where they do not fit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mergekit_bert as mb
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.delta import Dense
from mergekit_bert.adapters.patch import Patch
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.folder import write_folder
from mergekit_bert.encoder.load import Base
from mergekit_bert.encoder.sites import linear_layers
from mergekit_bert.encoder.stored import StoredEncoder, open_encoder
from mergekit_bert.errors import CompositionError, ModelFileError
from mergekit_bert.formats.checkpoint import read_checkpoint
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.formats.inputs import read_inputs
from mergekit_bert.hardware import generator
from tests.adapters.helpers import dense64, one_line, random_adapter
from tests.cli.command import mbert
from tests.tiny import DISTINCT, tiny_rows, write_tiny

HEADS = ("classifier", "pre_classifier", "pooler", "head", "score")


def fine_tuned(encoder: mb.Encoder, name: str, path: Path, seed: int = 1, examples: int = 100) -> Path:
    """A folder as `mbert finetune` writes it, every weight of it changed a little."""
    task, source = mb.get_task(name), generator(seed, 3)

    def noise(shape: Sequence[int]) -> Tensor:
        return 0.05 * torch.randn(tuple(shape), generator=source)

    sites = linear_layers(encoder)
    deltas = {site: Dense(noise(size)) for site, size in sites.items()}
    others = [n for n in encoder.weights if not (n.endswith(".weight") and n.removesuffix(".weight") in sites)]
    changed = fold(encoder, Patch(deltas, {n: noise(encoder.weights[n].shape) for n in others}))
    base = {"name": encoder.name, "fingerprint": encoder.fingerprint}
    base["tokenizer_fingerprint"] = Base.of(encoder).tokenizer_fingerprint
    record = {"kind": "full", "base": base, "max_length": 33, "training": {"examples": examples}, "scores": {}}
    write_folder(path, fresh_classifier(changed, task, generator(seed)), encoder, task, record)
    return path


@pytest.fixture(scope="module")
def pair(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [fine_tuned(bert, "sst", root / "sst", 1, 100), fine_tuned(bert, "sts", root / "sts", 2, 300)]


@pytest.fixture
def plain(bert: mb.Encoder, pair: list[Path], tmp_path: Path) -> Path:
    """The first of the pair without mbert's record."""
    folder = Path(shutil.copytree(pair[0], tmp_path / "sst"))
    (folder / "mbert.json").unlink()
    return folder


def encoder_tensors(folder: Path, encoder: mb.Encoder) -> dict[str, Tensor]:
    """The encoder's parameters of a folder, in float64."""
    found = {name.partition(".")[2]: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    return {name: found[name] for name in encoder.weights}


def summed(encoder: mb.Encoder, folders: Mapping[str, Path], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """``W + Σ λi (Wi − W)`` of every parameter, the pooler apart, in float64."""
    total = {name: value.double() for name, value in encoder.weights.items() if not name.startswith("pooler.")}
    for task, folder in folders.items():
        found = encoder_tensors(folder, encoder)
        for name, value in total.items():
            total[name] = value + weights[task] * (found[name] - encoder.weights[name].double())
    return total


@pytest.mark.parametrize("architecture", DISTINCT)
def test_a_streamed_merge_is_the_weighted_sum_of_all_tensors(
    encoders: dict[str, mb.Encoder], architecture: str, tmp_path: Path
) -> None:
    encoder = encoders[architecture]
    folders = {name: fine_tuned(encoder, name, tmp_path / name, seed) for seed, name in enumerate(("sst", "sts"))}
    weights = {"sst": 0.75, "sts": -0.5}
    stored = open_encoder(encoder.name)
    assert isinstance(stored, StoredEncoder)
    model = merge([read_checkpoint(path) for path in folders.values()], Recipe("fedavg", weights=weights), lazy=True)
    assert isinstance(model, mb.Merged)
    exact = summed(encoder, folders, weights)
    for task, path in zip(folders, write_dense(tmp_path / "out", model, stored), strict=True):
        before, after = load_file(folders[task] / "model.safetensors"), load_file(path / "model.safetensors")
        assert before.keys() == after.keys()
        for name, value in after.items():
            inner = name.partition(".")[2]
            if inner in exact:
                np.testing.assert_allclose(value, exact[inner], atol=1e-6, err_msg=name)
            else:  # the head, and what it alone reads, stay as they were
                assert name.split(".")[0] in HEADS or inner.startswith("pooler."), name
                np.testing.assert_allclose(value, before[name], atol=1e-6, err_msg=name)
    assert any(name.endswith("word_embeddings.weight") or "tok_embeddings" in name for name in exact)


def test_all_other_parameters_are_shifts(bert: mb.Encoder, pair: list[Path]) -> None:
    model = mb.merge(pair, "fedavg")
    assert model.weights == {"sst": 0.25, "sts": 0.75}
    exact = summed(bert, {"sst": pair[0], "sts": pair[1]}, model.weights)
    found = {f"{site}.weight": delta.dense() for site, delta in model.deltas.items()} | dict(model.shifts)
    assert found.keys() == exact.keys()
    assert {"embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"} <= model.shifts.keys()
    for name, change in found.items():
        np.testing.assert_allclose(bert.weights[name] + change, exact[name], atol=1e-6)


def test_a_checkpoint_and_an_adapter_add_up(bert: mb.Encoder, pair: list[Path]) -> None:
    adapter = random_adapter(bert, "para", targets="qv", train_bias=True)
    weights = {"sst": 0.5, "para": -2.0}
    model = mb.merge([pair[0], adapter], "task_arithmetic", weights)
    exact, tuned = dense64(adapter), encoder_tensors(pair[0], bert)
    assert len(exact) == 4
    for site, delta in model.deltas.items():
        change = 0.5 * (tuned[f"{site}.weight"] - bert.weights[f"{site}.weight"].double())
        change -= 2 * exact[site] if site in exact else 0
        np.testing.assert_allclose(delta.dense(), change, atol=1e-5)
    for name, shift in model.shifts.items():
        change = 0.5 * (tuned[name] - bert.weights[name].double())
        change -= 2 * adapter.shifts[name].double() if name in adapter.shifts else 0
        np.testing.assert_allclose(shift, change, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_one_checkpoint_alone_is_itself(bert: mb.Encoder, pair: list[Path], place: int, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    mb.save(mb.merge([pair[place]], "task_arithmetic"), path)
    task = mb.get_task(pair[place].name)
    rows = tiny_rows(task, 6)
    hf = AutoModelForSequenceClassification.from_pretrained(pair[place]).eval()
    columns = [list(column) for column in zip(*rows.texts, strict=True)]
    with torch.no_grad():
        inputs = AutoTokenizer.from_pretrained(pair[place])(*columns, padding=True, return_tensors="pt")
        expected = hf(**inputs).logits.numpy()
    np.testing.assert_allclose(mb.predictor(path, base=bert).outputs(task.name, rows), expected, atol=1e-5)
    assert expected.std() > 1e-3


def test_the_task_of_a_plain_folder_is_the_one_it_is_called_after(bert: mb.Encoder, plain: Path) -> None:
    (one,) = read_inputs(plain, bert.name)
    (two,) = read_inputs(plain, bert)
    for found in (one, two):
        assert (found.name, found.base) == ("sst", Base.of(bert))
        delta = found.deltas["encoder.layer.0.attention.self.query"].dense()
        name = "encoder.layer.0.attention.self.query.weight"
        np.testing.assert_allclose(delta, encoder_tensors(plain, bert)[name] - bert.weights[name].double(), atol=1e-6)


def _rename(change: Callable[[str], str]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({change(name): value for name, value in load_file(path).items()}, path, {"format": "pt"})

    return edit


def _shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def _half(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (_rename(lambda name: name.removeprefix("bert.")), 0),
        (
            _rename(lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")),
            0,
        ),
        (_shard, 0),
        (_half, 0.01),
    ],
    ids=["no prefix", "old names", "shards", "bf16"],
)
def test_other_ways_of_writing_a_folder(
    bert: mb.Encoder, plain: Path, pair: list[Path], change: Callable[[Path], object], tolerance: float
) -> None:
    change(plain)
    one, two = read_checkpoint(plain, bert), read_checkpoint(pair[0])
    assert one.deltas.keys() == two.deltas.keys()
    assert one.shifts.keys() == two.shifts.keys()
    for name, shift in two.shifts.items():
        np.testing.assert_allclose(one.shifts[name], shift, atol=tolerance)
    for site, delta in two.deltas.items():
        np.testing.assert_allclose(one.deltas[site].dense(), delta.dense(), atol=tolerance)


def test_few_tensors_are_in_memory_however_many_inputs(bert: mb.Encoder, tmp_path: Path) -> None:
    count = 6
    folders = [fine_tuned(bert, "sst", tmp_path / f"{n}", n) for n in range(count)]
    for number, folder in enumerate(folders):
        record = json.loads((folder / "mbert.json").read_text())
        record["task"]["name"] = f"t{number}"
        (folder / "mbert.json").write_text(json.dumps(record))
    script = Path(__file__).with_name("counted_reads.py")
    ran = subprocess.run([sys.executable, script, tmp_path / "out", *folders], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    weights = told["weights"]
    assert weights == len(bert.weights)
    assert told["before"] == weights + 2 * count  # the fingerprint of the base, and the heads
    pooler = 2  # stays the task's own: the others' are not read
    merged = (weights - pooler) * count + pooler
    written = weights + 2
    assert told["reads"] == told["before"] + merged + weights + written
    assert told["most"] <= 4


def _config(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _tensor(name: str, value: Tensor | None) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(name, None)
        save_file(tensors | ({} if value is None else {name: value}), path, {"format": "pt"})

    return edit


def _vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"goood"'))


LABELS = {str(place): name for place, name in enumerate(reversed(mb.get_task("sst").labels))}
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_vocabulary, "another vocabulary; expected the tokenizer of base"),
        (_tensor(EMBEDDINGS, torch.zeros(30, 32)), r"word_embeddings.weight has shape \(30, 32\); expected \(23, 32\)"),
        (_tensor(EMBEDDINGS, None), "no tensor embeddings.word_embeddings.weight"),
        (_tensor("classifier.bias", None), r"no tensor classifier.bias; expected \(5,\) for task 'sst'"),
        (_tensor("cls.predictions.bias", torch.zeros(3)), "cls.predictions.bias has shape .*expected heads of classif"),
        (_tensor("classifier.bias", torch.full((5,), torch.nan)), "classifier.bias' holds NaN"),
        (_config(model_type="electra"), "model_type is 'electra'; expected 'bert'"),
        (_config(hidden_act="relu"), "hidden_act is 'relu'; expected 'gelu', as in base"),
        (_config(num_attention_heads=4), "num_attention_heads is 4; expected 2"),
        (_config(id2label={"0": "a", "1": "b"}), "2 labels; expected 5 for task 'sst'"),
        (_config(id2label=LABELS), "labels in the order 4, 3, 2, 1, 0; expected 0, 1, 2, 3, 4"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors; expected weights in"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 99), "not readable as safetensors"),
    ],
)
def test_what_does_not_fit_the_base_is_one_line(
    bert: mb.Encoder, plain: Path, change: Callable[[Path], object], message: str
) -> None:
    change(plain)
    with pytest.raises((CompositionError, ModelFileError), match=message) as caught:
        read_checkpoint(plain, bert)
    assert one_line(caught.value)


def test_what_the_folder_does_not_say_must_be_said(bert: mb.Encoder, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"does not record its base; expected its base; name it with `base`"):
        read_checkpoint(plain)
    other = plain.rename(tmp_path / "mine")
    with pytest.raises(CompositionError, match="does not record its task; expected a folder named after one of"):
        read_checkpoint(other, bert)


def test_another_base_is_refused(pair: list[Path], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", "bert", seed=9)
    with pytest.raises(ModelFileError, match=r"made for base .*bert' \(weights .*give the `base` it was trained on"):
        read_checkpoint(pair[0], str(other))


def test_a_file_cut_short_after_opening_is_told(pair: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair[0], tmp_path / "sst"))
    found = read_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelFileError, match="cut short"):
        dict(found.shifts)


def test_the_command_writes_folders_and_no_file(bert: mb.Encoder, pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "dense"
    ran = mbert("merge", *map(str, pair), "--method", "fedavg", "--dense", out, here=tmp_path)
    assert ran.code == 0, ran.err
    assert "sst: fedavg of sst × 0.25, sts × 0.75" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    exact = summed(bert, {"sst": pair[0], "sts": pair[1]}, {"sst": 0.25, "sts": 0.75})
    for task in ("sst", "sts"):
        found = encoder_tensors(out / task, bert)
        for name, value in exact.items():
            np.testing.assert_allclose(found[name], value, atol=1e-6)
