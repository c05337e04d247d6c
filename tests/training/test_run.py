"""Whole runs: the same seed gives the same bytes anywhere, the manifest and the log say what happened."""

import hashlib
import json
import math
import platform
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import norm
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.data.metrics import metric
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.folder import read_folder
from mergekit_bert.encoder.heads import classifier
from mergekit_bert.encoder.load import Encoder, weights_fingerprint
from mergekit_bert.errors import BasisError, DataError, MbertWarning, MissingExtraError, OutputError, TrainingError
from mergekit_bert.files import read_tensors
from mergekit_bert.hardware import generator
from mergekit_bert.training import run
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.run import Control, is_finished, run_folder, train_adapter
from tests.tiny import tiny_rows
from tests.training.runs import everything, log, manifest, quick, train, tune

Train = Callable[[Encoder, Path], object]

RUNS: dict[str, Train] = {
    "lora": lambda encoder, out: train(encoder, out / "a.safetensors"),
    "regression": lambda encoder, out: train(encoder, out / "a.safetensors", "sts"),
    "probe": lambda encoder, out: train(encoder, out / "a.safetensors", kind="probe"),
    "bf16": lambda encoder, out: train(encoder, out / "a.safetensors", precision="bf16"),
    "dropout": lambda encoder, out: train(
        encoder,
        out / "a.safetensors",
        adapter=AdapterConfig(rank=2, dropout=0.3, basis="random", train_bias=True, train_layernorm=True),
    ),
    "full": lambda encoder, out: tune(encoder, out / "a"),
}


def weights(out: Path) -> bytes:
    """The bytes of what a run of ``RUNS`` made."""
    return (out / "a.safetensors" if (out / "a.safetensors").exists() else out / "a/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", RUNS)
def test_runs_repeat_whatever_torchs_global_state_is_and_leave_it_alone(
    bert: Encoder, tmp_path: Path, kind: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        RUNS[kind](bert, tmp_path / "one")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        torch.rand(3)
        RUNS[kind](bert, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert weights_fingerprint(dict(bert.model.named_parameters())) == bert.fingerprint
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["lora", "probe"])
def test_another_seed_gives_another_adapter(bert: Encoder, tmp_path: Path, kind: str) -> None:
    for seed in (0, 1):
        train(bert, tmp_path / str(seed) / "a.safetensors", kind=kind, seed=seed)
    heads = [read_adapter(tmp_path / str(seed) / "a.safetensors").head["classifier.weight"] for seed in (0, 1)]
    assert float((heads[0] - heads[1]).abs().max()) > 1e-3


def test_another_seed_gives_another_fine_tuned_model(bert: Encoder, tmp_path: Path) -> None:
    for seed in (0, 1):
        tune(bert, tmp_path / str(seed), seed=seed, epochs=1)
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


@pytest.mark.parametrize("pair", [("lora", "regression"), ("dropout", "probe"), ("lora", "full"), ("full", "full")])
def test_two_runs_at_once_give_the_same_bytes_as_one_after_the_other(
    bert: Encoder, tmp_path: Path, pair: tuple[str, str]
) -> None:
    for place, kind in enumerate(pair):
        RUNS[kind](bert, tmp_path / f"after {place}")
    errors: list[BaseException] = []

    def work(place: int, kind: str) -> None:
        try:
            RUNS[kind](bert, tmp_path / f"at once {place}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for place in range(2):
        assert weights(tmp_path / f"after {place}") == weights(tmp_path / f"at once {place}")


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
    assert metric(task.metric).value(held.label_column(), predicted) == pytest.approx(history[best], abs=1e-4)
    if kind == "probe":
        assert best < 3, "the test needs a run whose last epoch is not its best"


@pytest.mark.parametrize("name", ["sst", "sts"])
def test_training_learns_what_the_words_say(bert: Encoder, tmp_path: Path, name: str) -> None:
    task = get_task(name)
    adapter = train(bert, tmp_path / "a.safetensors", name, rows=400, epochs=4, lr=5e-3)
    fresh = tiny_rows(task, 200, seed=9)
    outputs = Predictor(adapter, bert).outputs(name, fresh)
    predicted = outputs.argmax(1) if task.range is None else outputs[:, 0].astype(np.float64)
    score = metric(task.metric).value(fresh.label_column(), predicted)
    most_frequent = max(np.mean(fresh.label_column() == label) for label in set(fresh.label_column()))
    assert score > (0.6 if task.range else most_frequent + 0.05)


def test_a_regressions_outputs_are_in_the_tasks_own_units(bert: Encoder, tmp_path: Path) -> None:
    task = Task(name="far", kind="regress", text=("a",), metrics=("pearson",), range=(100.0, 300.0))
    rows = tiny_rows(task, 200)
    for model in (
        train(bert, tmp_path / "a.safetensors", task, rows=200, epochs=3),
        tune(bert, tmp_path / "full", task, rows=200, epochs=1, lr=1e-3),
    ):
        outputs = Predictor(model, bert).outputs("far", rows)[:, 0]
        assert 120 < outputs.mean() < 280
        assert outputs.mean() == pytest.approx(rows.label_column().mean(), abs=20)


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


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_precisions_train_and_are_recorded(bert: Encoder, tmp_path: Path, kind: str, precision: str) -> None:
    out = tmp_path / "a"
    (train if kind == "lora" else tune)(bert, out, "sts", epochs=3, precision=precision, lr=5e-3)
    told = manifest(out)
    name = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert told["training"]["precision"] == told["run"]["precision"] == name
    losses = [epoch["train_loss"] for epoch in told["history"]]
    assert losses[-1] < losses[0]
    file = out if kind == "lora" else out / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float32}  # noqa: SIM118


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
    start = classifier(bert, sst, generator(0, 1)).head()
    assert set(probe.head) == set(start)
    assert all(not torch.equal(probe.head[name], start[name]) for name in start)
    assert not (tmp_path / "basis.json").exists(), "a probe takes no rows of the basis"


def test_the_manifest_tells_how_the_adapter_was_made(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    adapter = train(
        bert, out, epochs=3, patience=3, batch_size=7, hold_out=0.1, head_lr=0.004, weight_decay=0.2, seed=5
    )
    told, rows = manifest(out), tiny_rows(sst, 60)
    assert told["output"] == "a.safetensors"
    assert told["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    tensors, _ = read_tensors(out)
    stored = sum(tensor.numel() for tensor in tensors.values())  # B and head; A is row numbers
    encoder = sum(p.numel() for p in bert.model.parameters())
    total = encoder + stored + sum(2 * in_features for _, in_features in adapter.sites.values())
    assert told["parameters"] == {
        "trainable": stored,
        "total": total,
        "reduction_percent": pytest.approx(100 - 100 * stored / total, abs=6e-4),
    }
    expected = {
        "examples": 54,
        "held_out": 6,
        "truncated": 0,
        "epochs": 3,
        "steps": 3 * 8,
        "batch_size": 7,
        "lr": 0.01,
        "head_lr": 0.004,
        "weight_decay": 0.2,
        "seed": 5,
        "optimizer": "AdamW",
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "data": rows.fingerprint(),
    }
    assert {key: told["training"][key] for key in expected} == expected
    assert told["training"] == dict(adapter.training)
    assert told["training"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["run"]["base"] == bert.fingerprint
    assert told["run"]["task"] == json.loads(json.dumps(sst.to_json()))
    assert told["run"]["basis"] == {"seed": 0, "start": 0, "count": 2}
    assert [epoch["epoch"] for epoch in told["history"]] == [0, 1, 2]
    assert (told["device"], told["python"]) == ("cpu", platform.python_version())
    assert told["gpu_memory_bytes"] == {"average": None, "maximum": None}
    assert told["wall_seconds"] > 0
    assert told["peak_memory_bytes"] > 2**24


def test_the_manifest_of_a_fine_tuned_folder_counts_everything(bert: Encoder, tmp_path: Path) -> None:
    model = tune(bert, tmp_path / "full", epochs=1)
    tensors = read_plain(tmp_path / "full/model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    told = manifest(tmp_path / "full")
    assert told["parameters"] == {"trainable": count, "total": count, "reduction_percent": 0.0}
    assert model.record["kind"] == "full"
    assert model.base["fingerprint"] == bert.fingerprint
    assert model.record["training"] == told["training"]


def read_plain(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def test_recommended_rates_are_used_where_none_is_given_and_recorded(bert: Encoder, tmp_path: Path) -> None:
    from mergekit_bert.adapters.adapter import TYPES

    rates = set()
    for kind in ("lora", "probe"):
        train(bert, tmp_path / kind, kind=kind, lr=None, epochs=1)
        training = manifest(tmp_path / kind)["training"]
        record = TYPES.get(kind)
        for key, recommended in (("lr", record.lr), ("head_lr", record.head_lr)):
            assert recommended is None or training[key] == recommended
        assert training["lr"] > 0
        rates.add((training["lr"], training["head_lr"]))
    tune(bert, tmp_path / "full", lr=None, epochs=1)
    rates.add((manifest(tmp_path / "full")["training"]["lr"], manifest(tmp_path / "full")["training"]["head_lr"]))
    assert len(rates) == 3


def test_the_log_is_json_lines_with_every_tenth_step_and_every_epoch(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out, rows=150, epochs=3, patience=3, batch_size=8)
    events = log(out)
    steps = [event for event in events if "loss" in event]
    epochs = [event for event in events if "train_loss" in event]
    assert len(steps) + len(epochs) == len(events)
    assert [event["step"] for event in steps] == [10, 20, 30, 40]
    assert [event["step"] for event in epochs] == [15, 30, 45]
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert epochs == manifest(out)["history"]
    for event in steps:
        assert set(event) == {"step", "epoch", "loss", "lr", "seconds"}
        assert all(math.isfinite(value) for value in event.values())
    assert [event["seconds"] for event in steps] == sorted(event["seconds"] for event in steps)
    assert [event["epoch"] for event in steps] == [0, 1, 1, 2]


def test_tensorboard_shows_the_figures_of_the_log(bert: Encoder, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "a.safetensors"
    train(bert, out, rows=120, control=Control(show=False, tensorboard=True))
    board = EventAccumulator(str(run_folder(out) / "tensorboard"))
    board.Reload()
    logged = {(name, event["step"]): event[name] for event in log(out) for name in event if name != "step"}
    shown = {(tag, point.step): point.value for tag in board.Tags()["scalars"] for point in board.Scalars(tag)}
    assert set(shown) == set(logged)
    assert shown == pytest.approx(logged, rel=1e-5)
    assert {"loss", "lr", "train_loss", "held_out_accuracy"} <= {tag for tag, _ in shown}


def test_without_asking_there_is_no_tensorboard(bert: Encoder, tmp_path: Path) -> None:
    train(bert, tmp_path / "a.safetensors", epochs=1)
    assert set(everything(tmp_path / "a.run")) == {"log.jsonl", "manifest.json"}


def test_tensorboard_without_its_package_says_what_to_install(
    bert: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"install mbert\[tensorboard\]"):
        train(bert, tmp_path / "a.safetensors", control=Control(show=False, tensorboard=True))


def test_cut_rows_are_told_once_and_counted(bert: Encoder, tmp_path: Path) -> None:
    rows = tiny_rows(get_task("sts"), 60)
    long = sum(sum(len(text.split()) for text in texts) + 3 > 12 for texts in rows.texts)
    assert 0 < long < 60
    with pytest.warns(MbertWarning, match=rf"sts: {long} of 60 rows are longer than 12 tokens and are cut") as told:
        adapter = train(bert, tmp_path / "a.safetensors", "sts", max_length=12)
    assert len([one for one in told if issubclass(one.category, MbertWarning)]) == 1
    assert adapter.training["truncated"] == long
    assert adapter.max_length == 12


def test_no_longer_than_the_encoder_can_take(bert: Encoder, tmp_path: Path) -> None:
    assert train(bert, tmp_path / "a.safetensors", max_length=500).max_length == 40


def test_held_out_rows_are_never_trained_on(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    """Other labels on the held-out rows change the scores, but not one trained bit of the first epoch."""
    rows = tiny_rows(sst, 60)
    _, held = hold_out(rows, 0.2, 1000, 0)
    assert rows.labels is not None
    held_texts = set(held.texts)
    other = Rows(
        rows.texts,
        tuple(4 - label if text in held_texts else label for text, label in zip(rows.texts, rows.labels, strict=True)),
        rows.where,
    )
    found = [
        train_adapter(bert, sst, one, tmp_path / str(n) / "a", "lora", AdapterConfig(rank=2), quick(epochs=1), Control(
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
    with pytest.raises(BasisError, match="33 free rows in a run; use a smaller --rank"):
        train(bert, tmp_path / "a.safetensors", adapter=AdapterConfig(rank=33))
    train(bert, tmp_path / "a.safetensors", adapter=AdapterConfig(rank=33, basis="random"), epochs=1)


def test_an_output_that_exists_is_refused_and_left_as_it_is(bert: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    train(bert, out, epochs=1)
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"a.safetensors: it exists already; .*--force"):
        train(bert, out, epochs=1, seed=3)
    assert everything(tmp_path) == before
    train(bert, out, epochs=1, seed=3, control=Control(show=False, force=True))
    assert out.read_bytes() != before["a.safetensors"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_output_that_cannot_be_written_is_told(bert: Encoder, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"not a directory; expected"):
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
    with pytest.raises(Exception, match="after reloading its outputs differ by"):
        train(bert, tmp_path / "a.safetensors", epochs=1)


@pytest.mark.parametrize("kind", ["lora", "probe", "full"])
def test_every_architecture_trains(encoder: Encoder, tmp_path: Path, kind: str) -> None:
    fingerprint = encoder.fingerprint
    if kind == "full":
        tune(encoder, tmp_path / "a", rows=24, epochs=1)
    else:
        adapter = train(encoder, tmp_path / "a", kind=kind, rows=24, epochs=1)
        assert bool(adapter.head) and adapter.base.fingerprint == fingerprint  # noqa: PT018
    assert weights_fingerprint(dict(encoder.model.named_parameters())) == fingerprint


def test_the_options_of_a_run_are_all_in_its_manifest(bert: Encoder, tmp_path: Path) -> None:
    import dataclasses

    train(bert, tmp_path / "a", epochs=1)
    kept = {field.name for field in dataclasses.fields(TrainConfig)} - {"checkpoint_seconds"}
    assert kept <= set(manifest(tmp_path / "a")["training"])
