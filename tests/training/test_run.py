"""Whole runs: what they train, keep and write, and what they refuse."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import norm
from mergekit_bert.data.metric import metric
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.classifier import fresh_classifier
from mergekit_bert.encoder.folder import read_folder
from mergekit_bert.encoder.load import Encoder, weights_fingerprint
from mergekit_bert.errors import BasisError, DataError, MbertWarning, OutputError, TrainingError
from mergekit_bert.hardware import generator
from mergekit_bert.models.prediction import Predictor
from mergekit_bert.training import run
from mergekit_bert.training.manifest import Control, is_finished
from mergekit_bert.training.run import finetune, train_adapter
from tests.tiny import tiny_rows
from tests.training.runs import everything, manifest, quick, train, tune


@pytest.mark.parametrize("name", ["sst", "sts"])
@pytest.mark.parametrize("kind", ["lora", "probe", "full"])
def test_the_kept_epoch_is_the_best_one_of_the_history(bert: Encoder, tmp_path: Path, kind: str, name: str) -> None:
    task, out = get_task(name), tmp_path / "a.safetensors"
    if kind == "full":
        model: Any = tune(bert, out, task, epochs=4, lr=0.02, patience=4)
        saved = model.record["scores"]
    else:
        model = train(bert, out, task, kind, epochs=4, lr=0.3, patience=4)
        saved = model.scores
    history = [epoch[f"held_out_{task.metric}"] for epoch in manifest(out)["history"]]
    best = history.index(max(history))
    assert len(history) == 4
    assert manifest(out)["training"]["best_epoch"] == best + 1
    assert saved == {f"held_out_{task.metric}": history[best]}
    _, held = hold_out(tiny_rows(task, 60), 0.2, 1000, 0)
    outputs = Predictor(model, None if kind == "full" else bert).outputs(name, held)
    predicted = outputs.argmax(1) if task.range is None else outputs[:, 0].astype(np.float64)
    assert metric(task.metric).value(held.label_column(task), predicted) == pytest.approx(history[best], abs=1e-4)
    if (kind, name) == ("probe", "sst"):
        assert best < 3, "the test needs a run whose last epoch is not its best"


def plain_rows(task: Task, count: int, seed: int) -> Rows:
    """Rows that say good or bad, with a label to match."""
    source = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        word, label = source.choice((("good", 4.0), ("bad", 1.0)))
        texts.append(tuple(f"{word} {word} {source.choice(('cat', 'dog', 'film'))}" for _ in task.text))
        labels.append(label)
    return Rows(tuple(texts), tuple(labels), "here")


@pytest.mark.parametrize(("kind", "name"), [("lora", "sts"), ("dora", "sts"), ("full", "sts"), ("full", "sst")])
def test_training_learns_what_the_words_say(bert: Encoder, tmp_path: Path, kind: str, name: str) -> None:
    task, config = get_task(name), quick(epochs=8, lr=3e-3, patience=8)
    rows, control = plain_rows(task, 160, 1), Control(show=False)
    if kind == "full":
        model: Any = finetune(bert, task, rows, tmp_path / "a", config, control)
    else:
        model = train_adapter(bert, task, rows, tmp_path / "a", kind, None, config, control)
    fresh = plain_rows(task, 50, 2)
    outputs = Predictor(model, bert).outputs(name, fresh)
    if task.range is None:
        assert outputs.argmax(1).tolist() == fresh.label_column(task).tolist()
    else:
        assert ((outputs[:, 0] > 2.5) == (fresh.label_column(task) > 2.5)).all()
        np.testing.assert_allclose(outputs[:, 0], fresh.label_column(task), atol=1.0)


def test_a_regressions_outputs_are_in_the_tasks_own_units(bert: Encoder, tmp_path: Path) -> None:
    task = Task(name="far", kind="regress", text=("a",), metrics=("pearson",), range=(100.0, 300.0))
    rows = tiny_rows(task, 100)
    for model in (
        train(bert, tmp_path / "a.safetensors", task, rows=100, epochs=3, lr=3e-3),
        tune(bert, tmp_path / "full", task, rows=100, epochs=3, lr=3e-3),
    ):
        outputs = Predictor(model, bert).outputs("far", rows)[:, 0]
        assert 120 < outputs.mean() < 280
        assert outputs.mean() == pytest.approx(rows.label_column(task).mean(), abs=20)


def test_a_head_is_scaled_into_a_dense_regressions_last_layer(bert: Encoder, tmp_path: Path) -> None:
    tune(bert, tmp_path / "full", "sts", epochs=1)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = tiny_rows(get_task("sts"), 8, seed=4)
    texts = [list(column) for column in zip(*rows.texts, strict=True)]
    inputs = AutoTokenizer.from_pretrained(tmp_path / "full")(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full").eval()(**inputs).logits
    found = Predictor(read_folder(tmp_path / "full")).outputs("sts", rows)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


def test_rank_stabilised_is_another_alpha(bert: Encoder, tmp_path: Path) -> None:
    one = train(bert, tmp_path / "1/a", adapter=AdapterConfig(rank=4, alpha=8.0, rank_stabilized=True))
    two = train(bert, tmp_path / "2/a", adapter=AdapterConfig(rank=4, alpha=16.0))
    other = train(bert, tmp_path / "3/a", adapter=AdapterConfig(rank=4, alpha=8.0))
    assert (one.config.scale, two.config.scale, other.config.scale) == (4.0, 4.0, 2.0)
    for site in one.sites:
        assert torch.equal(one.tensors[site]["B"], two.tensors[site]["B"])
        delta = one.tensors[site]["B"] @ one.tensors[site]["A"] * (8 / math.sqrt(4))
        torch.testing.assert_close(one.deltas()[site].dense(), delta)
    assert any(not torch.equal(one.tensors[site]["B"], other.tensors[site]["B"]) for site in one.sites)


SHIFTS = {
    (False, False): r"(?!)",
    (True, False): r"(?!.*LayerNorm).*\.bias",
    (False, True): r".*LayerNorm\.(weight|bias)",
    (True, True): r".*(LayerNorm\.weight|\.bias)",
}


@pytest.mark.parametrize(("bias", "norms"), SHIFTS)
def test_biases_and_norms_are_trained_where_asked(bert: Encoder, tmp_path: Path, bias: bool, norms: bool) -> None:
    config = AdapterConfig(rank=2, train_bias=bias, train_layernorm=norms)
    adapter = train(bert, tmp_path / "a.safetensors", adapter=config)
    parameters = dict(bert.model.named_parameters())
    assert set(adapter.shifts) == {name for name in parameters if re.fullmatch(SHIFTS[bias, norms], name)}
    for name, shift in adapter.shifts.items():
        assert shift.shape == parameters[name].shape
        assert bool(shift.any()) or name.endswith("key.bias"), name
    assert all(norm(delta) > 0 for delta in adapter.deltas().values())


@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("qv", r".*\.self\.(query|value)"),
        ("qkv", r".*\.self\.(query|key|value)"),
        ("attention", r".*\.(self\.(query|key|value)|attention\.output\.dense)"),
        ("all-linear", r".*(query|key|value|dense)"),
        (r"encoder\.layer\.1\..*query", r"encoder\.layer\.1\.attention\.self\.query"),
    ],
)
def test_only_the_targets_are_adapted(bert: Encoder, tmp_path: Path, targets: str, pattern: str) -> None:
    adapter = train(bert, tmp_path / "a", adapter=AdapterConfig(rank=2, targets=targets), epochs=1)
    names = {name.removesuffix(".weight") for name, p in bert.model.named_parameters() if p.dim() == 2}
    expected = {name for name in names if re.fullmatch(pattern, name) and "embedding" not in name}
    assert set(adapter.sites) == expected == set(adapter.deltas())


def test_a_probe_is_a_head_alone(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    probe = train(bert, tmp_path / "a.safetensors", kind="probe")
    assert (probe.sites, probe.tensors, probe.shifts, probe.basis) == ({}, {}, {}, None)
    start = fresh_classifier(bert, sst, generator(0, 1)).head()
    assert set(probe.head) == set(start)
    assert all(not torch.equal(probe.head[name], start[name]) for name in start)
    assert not (tmp_path / "basis.json").exists(), "a probe takes no rows of the basis"


def test_cut_rows_are_told_once_and_counted(bert: Encoder, tmp_path: Path) -> None:
    rows = tiny_rows(get_task("sts"), 60)
    long = sum(sum(len(text.split()) for text in texts) + 3 > 12 for texts in rows.texts)
    assert 0 < long < 60
    with pytest.warns(
        MbertWarning, match=rf"sts: {long} of 60 rows are longer than 12 tokens and are truncated"
    ) as told:
        adapter = train(bert, tmp_path / "a.safetensors", "sts", max_length=12)
    assert len([one for one in told if issubclass(one.category, MbertWarning)]) == 1
    assert adapter.training["truncated"] == long
    assert adapter.max_length == 12


def test_no_longer_than_the_encoder_can_take(bert: Encoder, tmp_path: Path) -> None:
    assert train(bert, tmp_path / "a.safetensors", max_length=500).max_length == 40


def test_held_out_rows_are_never_trained_on(bert: Encoder, sts: Task, tmp_path: Path) -> None:
    """Other labels on the held-out rows change the scores, but not one trained bit of the first epoch."""
    rows = tiny_rows(sts, 60)
    _, held = hold_out(rows, 0.2, 1000, 0)
    assert rows.labels is not None
    held_texts = set(held.texts)
    other = Rows(
        rows.texts,
        tuple(5 - label if text in held_texts else label for text, label in zip(rows.texts, rows.labels, strict=True)),
        rows.where,
    )
    found = [
        train_adapter(bert, sts, one, tmp_path / str(n) / "a", "lora", AdapterConfig(rank=2), quick(epochs=1), Control(
            show=False))
        for n, one in enumerate((rows, other))
    ]  # fmt: skip
    for site in found[0].sites:
        assert torch.equal(found[0].tensors[site]["B"], found[1].tensors[site]["B"])
    assert found[0].training["data"] != found[1].training["data"]
    assert found[0].scores != found[1].scores


def test_too_few_rows_are_told(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 rows; expected enough rows to hold out 20%"):
        train(bert, tmp_path / "a.safetensors", rows=2)
    assert not is_finished(tmp_path / "a.safetensors")


def test_two_adapters_of_a_folder_take_different_rows(bert: Encoder, tmp_path: Path) -> None:
    one = train(bert, tmp_path / "a.safetensors", epochs=1)
    two = train(bert, tmp_path / "b.safetensors", "sts", epochs=1)
    assert one.basis is not None
    assert two.basis is not None
    assert not one.basis.overlaps(two.basis)
    for site, (_, width) in one.sites.items():
        product = one.tensors[site]["A"].double() @ two.tensors[site]["A"].double().T
        assert float(product.abs().max()) < 1e-6, (site, width)
        assert torch.equal(one.tensors[site]["A"], one.basis.matrix(site, width))


def test_a_rank_that_the_basis_cannot_give_is_told_before_any_work(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(BasisError, match="33 free rows in a run; use a smaller `rank`"):
        train(bert, tmp_path / "a.safetensors", adapter=AdapterConfig(rank=33))
    train(bert, tmp_path / "a.safetensors", adapter=AdapterConfig(rank=33, basis="random"), epochs=1)


def test_an_output_that_exists_is_refused_and_left_as_it_is(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out, epochs=1)
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"a.safetensors: it exists already; .*`force`"):
        train(bert, out, epochs=1, seed=3)
    assert everything(tmp_path) == before
    train(bert, out, epochs=1, seed=3, control=Control(show=False, force=True))
    assert out.read_bytes() != before["a.safetensors"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_output_that_cannot_be_written_is_told(bert: Encoder, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"(not a directory|file exists); expected .*; .*choose another"):
        (train if kind == "lora" else tune)(bert, tmp_path / "file" / "a.safetensors")


def test_threads_are_those_of_torch(bert: Encoder, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"threads: torch uses \d+; expected 99; .*set_threads first"):
        train(bert, tmp_path / "a.safetensors", threads=99)


def test_a_saved_file_that_does_not_give_the_same_outputs_is_refused(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = run.write_adapter

    def spoil(path: Path, adapter: Any) -> None:
        head = {name: tensor + 1 for name, tensor in adapter.head.items()}
        import dataclasses

        really(path, dataclasses.replace(adapter, head=head))

    monkeypatch.setattr(run, "write_adapter", spoil)
    with pytest.raises(Exception, match="its outputs differ by"):
        train(bert, tmp_path / "a.safetensors", epochs=1)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_architecture_trains(encoder: Encoder, tmp_path: Path, kind: str) -> None:
    fingerprint = encoder.fingerprint
    if kind == "full":
        tune(encoder, tmp_path / "a", rows=24, epochs=1)
    else:
        adapter = train(encoder, tmp_path / "a", kind=kind, rows=24, epochs=1)
        assert bool(adapter.head) and adapter.base.fingerprint == fingerprint  # noqa: PT018
    assert weights_fingerprint(dict(encoder.model.named_parameters())) == fingerprint
