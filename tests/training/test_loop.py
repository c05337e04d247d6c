"""The one loop against a plain one written here, and everything it promises on its way."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import AdapterConfig, LowRankOptions
from mergekit_bert.adapters.family import FAMILIES
from mergekit_bert.data import batches
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.rows import hold_out
from mergekit_bert.data.task import Task, get_task
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import find_sites
from mergekit_bert.errors import TrainingError
from mergekit_bert.training import loop
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.log import RunLog
from mergekit_bert.training.supervised import Supervised, TrainingRun, fit
from mergekit_bert.training.trainable import Trainable, adapter_trainable, full_trainable
from tests.tiny import tiny_rows
from tests.training.runs import quick

LR, HEAD_LR = 0.02, 0.05
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, random basis": ("lora", {"basis": "random"}),
    "lora, biases and norms": ("lora", {"train_bias": True, "train_layernorm": True, "targets": "qv"}),
    "lora, rank-stabilised": ("lora", {"rank_stabilized": True, "rank": 4}),
    "dora": ("dora", {}),
    "probe": ("probe", {}),
    "full": ("full", {}),
}


def work_of(encoder: Encoder, task: Task, kind: str, config: TrainConfig) -> Trainable:
    name, options = KINDS[kind]
    if name == "full":
        return full_trainable(encoder, task, config)
    record = FAMILIES.get(name).options
    adapter = record(**({"rank": 3} | options)) if issubclass(record, LowRankOptions) else record()
    sites = find_sites(encoder, adapter.targets) if isinstance(adapter, LowRankOptions) else {}
    basis = (
        BasisRows(0, 3, adapter.rank) if isinstance(adapter, AdapterConfig) and adapter.basis == "orthogonal" else None
    )
    return adapter_trainable(encoder, task, name, adapter, sites, basis, config)


def values(work: Trainable) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in work.parameters.items()}


def setting_of(
    encoder: Encoder, task: Task, folder: Path, config: TrainConfig, rows: int = 45, dtype: torch.dtype = torch.float32
) -> TrainingRun:
    kept, held = hold_out(tiny_rows(task, rows), config.hold_out, config.hold_out_limit, config.seed)
    parts = [tokenise(part, task, encoder.tokenizer, 40, encoder.pad_token) for part in (kept, held)]
    return TrainingRun(task, parts[0], parts[1], config, LR, HEAD_LR, dtype, folder, {}, show=False)


def padded(tokens: Tokens, index: list[int]) -> dict[str, Tensor]:
    """Model inputs of some rows, padded one by one."""
    columns = {**tokens.columns, "attention_mask": [[1] * tokens.length(row) for row in range(len(tokens))]}
    padding = {**tokens.padding, "attention_mask": 0}
    return {
        name: nn.utils.rnn.pad_sequence(
            [torch.tensor(column[i]) for i in index], batch_first=True, padding_value=padding[name]
        )
        for name, column in columns.items()
    }


def plain_loss(task: Task, outputs: Tensor, tokens: Tokens, index: list[int]) -> Tensor:
    assert tokens.labels is not None
    labels = [tokens.labels[i] for i in index]
    if task.range is None:
        picked = outputs.log_softmax(1)[torch.arange(len(index)), torch.tensor(labels).long()]
        return -picked.mean()
    low, high = task.range
    wanted = torch.tensor([(label - low) / (high - low) for label in labels])
    return (outputs[:, 0] - wanted).square().mean()


def plain_score(task: Task, model: nn.Module, held: Tokens) -> float:
    with torch.no_grad():
        outputs = torch.cat([model(**padded(held, [row])) for row in range(len(held))]).double().numpy()
    assert held.labels is not None
    if task.range is None:
        return float(np.mean(outputs.argmax(1) == np.array(held.labels)))
    return float(np.corrcoef(outputs[:, 0], np.array(held.labels))[0, 1])


def plain_fit(work: Trainable, setting: TrainingRun) -> tuple[dict[str, Tensor], list[float]]:
    """AdamW by its formula, the schedule a broken line, clipping by hand: the best epoch's parameters, and scores."""
    config, names = setting.config, list(work.parameters)
    first = {name: torch.zeros_like(work.parameters[name]) for name in names}
    second = {name: torch.zeros_like(work.parameters[name]) for name in names}
    total = config.epochs * math.ceil(len(setting.train) / config.batch_size)
    rise = round(config.warmup * total)
    step, scores, best = 0, list[float](), dict[str, Tensor]()
    for epoch in range(config.epochs):
        for index in setting.train.shuffled(config.batch_size, config.seed, epoch):
            loss = plain_loss(setting.task, work.model(**padded(setting.train, index)), setting.train, index)
            grads = dict(zip(names, torch.autograd.grad(loss, [work.parameters[name] for name in names]), strict=True))
            length = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
            shrink = min(1.0, config.clip / (length + 1e-6))
            share = np.interp(step, [-1, rise - 1, rise, total], [0, 1, 1, 0]) if rise else 1 - step / total
            step += 1
            with torch.no_grad():
                for name in names:
                    parameter, grad = work.parameters[name], grads[name] * shrink
                    rate = share * (setting.head_lr if name.startswith("head.") else setting.lr)
                    if parameter.dim() > 1:
                        parameter *= 1 - rate * config.weight_decay
                    first[name] = 0.9 * first[name] + 0.1 * grad
                    second[name] = 0.999 * second[name] + 0.001 * grad.square()
                    mean, spread = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                    parameter -= rate * mean / (spread.sqrt() + 1e-8)
        scores.append(plain_score(setting.task, work.model, setting.held_out))
        if scores[-1] > max(scores[:-1], default=-math.inf):
            best = {name: parameter.detach().clone() for name, parameter in work.parameters.items()}
    return best, scores


@pytest.mark.parametrize("clip", [1e6, 0.02])
@pytest.mark.parametrize("name", ["sst", "sts"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_ends_where_a_plain_one_does(bert: Encoder, tmp_path: Path, kind: str, name: str, clip: float) -> None:
    task = get_task(name)
    config = quick(epochs=2, head_dropout=0.0, warmup=0.3, weight_decay=0.1, clip=clip, hold_out=0.3, patience=9)
    setting = setting_of(bert, task, tmp_path, config)
    found = fit(work_of(bert, task, kind, config), setting)
    expected, scores = plain_fit(work_of(bert, task, kind, config), setting)
    history = [epoch.score for epoch in found.progress.epochs]
    np.testing.assert_allclose(history, scores, atol=2e-3)
    assert found.best.keys() == expected.keys()
    start = values(work_of(bert, task, kind, config))
    for parameter, value in expected.items():
        moved, apart = (value - start[parameter]).norm(), (found.best[parameter] - value).norm()
        if parameter.endswith("key.bias"):  # a softmax does not see it: its gradient is rounding alone
            assert max(moved, apart) < 1e-3
        else:
            assert apart <= 0.002 * moved, parameter
            assert moved > 0, parameter


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_budget_changes_nothing_but_rounding(
    bert: Encoder, sts: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = quick(epochs=1, head_dropout=0.0, batch_size=8)
    start = values(work_of(bert, sts, kind, config))
    found = []
    for budget in (10_000, 40, 1):
        monkeypatch.setattr(batches, "TOKEN_BUDGET", budget)
        found.append(fit(work_of(bert, sts, kind, config), setting_of(bert, sts, tmp_path / str(budget), config)).best)
    for other in found[1:]:
        for name, value in found[0].items():
            moved, apart = (value - start[name]).norm(), (other[name] - value).norm()
            if not name.endswith("key.bias"):  # a softmax does not see it: its gradient is rounding alone
                assert apart <= 0.01 * moved, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_changes_and_nothing_else(bert: Encoder, sst: Task, tmp_path: Path, kind: str) -> None:
    config = quick(epochs=1)
    work = work_of(bert, sst, kind, config)
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    whole = {name: p.detach().clone() for name, p in bert.model.named_parameters()}
    trained = {id(parameter) for parameter in work.parameters.values()}
    names = {name for name, p in work.model.named_parameters() if id(p) in trained}
    assert len(names) == len(work.parameters)
    fit(work, setting_of(bert, sst, tmp_path, config))
    changed = {name for name, p in work.model.named_parameters() if not torch.equal(p, before[name])}
    idle = {name for name in names if name.endswith("key.bias")}  # a softmax does not see them
    assert changed - idle == names - idle
    for name, parameter in bert.model.named_parameters():
        assert torch.equal(parameter, whole[name]), f"the encoder's own {name} was changed"
        assert parameter.grad is None
        assert not parameter.requires_grad
    wanted = {
        "lora": r"B",
        "lora, random basis": r"A B",
        "lora, biases and norms": r"B bias weight",
        "lora, rank-stabilised": r"B",
        "dora": r"A B m",
        "probe": "",
    }
    if kind != "full":
        assert {name.rpartition(".")[2] for name in names if not name.startswith("shell.classifier")} == set(
            wanted[kind].split()
        )
    else:
        assert names == set(before)


def test_frozen_basis_rows_stay_as_they_are(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    config = quick()
    work = work_of(bert, sst, "lora", config)
    fit(work, setting_of(bert, sst, tmp_path, config))
    for name, parameter in work.model.named_parameters():
        if name.endswith("tensors.A"):
            site = name.removeprefix("shell.bert.").removesuffix(".tensors.A")
            assert torch.equal(parameter, BasisRows(0, 3, 3).matrix(site, parameter.shape[1]))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.9])
def test_the_learning_rate_rises_and_falls_in_straight_lines(
    bert: Encoder, sst: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: float
) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    config = quick(epochs=5, warmup=warmup, patience=9)
    fit(work_of(bert, sst, "lora", config), setting_of(bert, sst, tmp_path, config))
    rates = [event["lr"] for event in logged(tmp_path) if "lr" in event]
    total = len(rates)
    assert total == 5 * math.ceil(36 / 8)
    rise = round(warmup * total)
    up = [LR * (step + 1) / rise for step in range(rise)]
    down = [LR * (1 - step / (total - rise)) for step in range(total - rise)]
    assert rates == pytest.approx(up + down)
    assert max(rates) == LR


def test_an_epochs_loss_is_the_mean_of_its_steps(
    bert: Encoder, sst: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    config = quick(epochs=2)
    outcome = fit(work_of(bert, sst, "lora", config), setting_of(bert, sst, tmp_path, config))
    for epoch, event in enumerate(outcome.history):
        losses = [one["loss"] for one in logged(tmp_path) if one.get("loss") and one["epoch"] == epoch]
        assert len(losses) == 5
        assert event["train_loss"] == pytest.approx(sum(losses) / 5)
        assert event["epoch"] == epoch


@pytest.mark.parametrize(
    ("scores", "patience", "epochs", "best"),
    [
        ([0.5, 0.6, 0.6, 0.4, 0.9], 2, 4, 1),
        ([0.5, 0.6, 0.6, 0.4, 0.9], 3, 5, 4),
        ([0.5, 0.4, 0.9], 1, 2, 0),
        ([-0.5, -0.6, -0.7, -0.4], 2, 3, 0),
        ([0.1, 0.2, 0.3, 0.4], 1, 4, 3),
        ([0.0, 0.0, 0.0, 0.0], 2, 3, 0),
    ],
)
def test_training_stops_by_patience_and_keeps_the_best_epoch(
    bert: Encoder,
    sst: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    patience: int,
    epochs: int,
    best: int,
) -> None:
    seen: list[dict[str, Tensor]] = []

    def scripted(self: Supervised) -> float:
        seen.append(self.values())
        return scores[len(seen) - 1]

    monkeypatch.setattr(Supervised, "score", scripted)
    config = quick(epochs=len(scores), patience=patience)
    outcome = fit(work_of(bert, sst, "probe", config), setting_of(bert, sst, tmp_path, config))
    assert (len(outcome.progress.epochs), outcome.progress.best_epoch) == (epochs, best)
    assert outcome.progress.best_score == scores[best]
    assert len(outcome.history) == epochs
    for name, value in outcome.best.items():
        assert torch.equal(value, seen[best][name])
        assert best == epochs - 1 or not torch.equal(value, seen[-1][name])


@pytest.mark.parametrize("kind", ["lora", "probe", "full"])
def test_bf16_trains_to_about_the_same_and_keeps_float32_parameters(
    bert: Encoder, sts: Task, tmp_path: Path, kind: str
) -> None:
    config = quick(epochs=2, head_dropout=0.0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        work = work_of(bert, sts, kind, config)
        start = values(work)
        best = fit(work, setting_of(bert, sts, tmp_path / str(dtype), config, dtype=dtype)).best
        assert {value.dtype for value in best.values()} == {torch.float32}
        results[dtype] = torch.cat([(best[name] - start[name]).flatten() for name in best])
    one, two = results.values()
    assert not torch.equal(one, two)
    assert functional.cosine_similarity(one, two, dim=0) > 0.8


def test_bf16_computes_in_bf16_and_keeps_frozen_weights_in_it(bert: Encoder, sst: Task, tmp_path: Path) -> None:
    config, seen = quick(epochs=1), set[torch.dtype]()
    work = work_of(bert, sst, "lora", config)
    layer = work.model.encoder.get_submodule("encoder.layer.0.intermediate.dense")
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    fit(work, setting_of(bert, sst, tmp_path, config, dtype=torch.bfloat16))
    assert seen == {torch.bfloat16}
    frozen = {p.dtype for p in work.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_dropout_is_on_while_training_and_off_while_scoring(bert: Encoder, sts: Task, tmp_path: Path) -> None:
    without, with_dropout = quick(epochs=1, head_dropout=0.0), quick(epochs=1, head_dropout=0.5)
    results = []
    for config in (without, with_dropout, with_dropout):
        work = work_of(bert, sts, "probe", config)
        setting = setting_of(bert, sts, tmp_path / str(len(results)), config)
        results.append(fit(work, setting).best["head.classifier.weight"])
        objective = Supervised(work, setting)
        assert objective.score() == objective.score()
        assert objective.score() == pytest.approx(plain_score(sts, work.model, setting.held_out), abs=2e-3)
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", ["sst", "sts"])
def test_a_run_that_diverges_ends_in_one_line(bert: Encoder, tmp_path: Path, name: str) -> None:
    task, config = get_task(name), quick(epochs=1, warmup=0.0, hold_out=0.3)
    setting = dataclasses.replace(setting_of(bert, task, tmp_path, config, rows=11), lr=1e38, head_lr=1e38)
    with pytest.raises(TrainingError, match=f"training {name}: .* not finite; .*; use a smaller `lr`"):
        fit(work_of(bert, task, "lora", config), setting)


def test_the_log_is_closed_when_a_run_fails(
    bert: Encoder, sst: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(RunLog, "close", lambda self: closed.append(True))

    def fail(*_: object) -> float:
        raise TrainingError("here", "a fault", "none", "mend it")

    monkeypatch.setattr(loop, "step", fail)
    config = quick(epochs=1)
    with pytest.raises(TrainingError, match="a fault"):
        fit(work_of(bert, sst, "probe", config), setting_of(bert, sst, tmp_path, config))
    assert closed == [True]
