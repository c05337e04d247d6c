"""What every kind of task must keep to, on one small task of each kind."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_bert as mb
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.composing.dense import write_dense
from mergekit_bert.composing.file import read_model, write_model
from mergekit_bert.composing.merging import merge
from mergekit_bert.composing.prediction import Predictor
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.kind import KINDS, Label, LabelError, kind_of
from mergekit_bert.data.metrics import METRICS
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.folder import read_folder
from mergekit_bert.errors import DataError, TrainingError
from mergekit_bert.evaluation.scores import scores_of
from mergekit_bert.registry import names_in
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import random_adapter
from tests.tiny import WORDS

EXAMPLES = {kind.name: Task(kind.name, kind.name, ("a",), **kind.example.fields) for kind in KINDS}
OWN = names_in("mergekit_bert.data.kinds")


def outputs_of(name: str, rows: int = 4, seed: int = 0) -> torch.Tensor:
    width = kind_of(EXAMPLES[name]).outputs(EXAMPLES[name])
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rows_of(name: str, count: int, seed: int = 0) -> Rows:
    """Rows whose label follows from the words."""
    task, source = EXAMPLES[name], random.Random(seed)
    texts = [" ".join(source.choices(WORDS, k=source.randint(2, 9))) for _ in range(count)]
    cells = kind_of(task).example.cells
    marks = [("good" in text) + ("cat" in text) + ("film" in text) for text in texts]
    labels: list[Label] = [kind_of(task).parse(task, cells[mark % len(cells)]) for mark in marks]
    return Rows(tuple((text,) for text in texts), tuple(labels), f"tiny {task.name}")


QUICK = {"batch_size": 8, "max_length": 40, "precision": "fp32"}
SILENT = Control(show=False)


@pytest.mark.parametrize("name", KINDS.names())
def test_it_goes_the_whole_way(name: str, bert: mb.Encoder, tmp_path: Path) -> None:
    """Trained, saved, reloaded, scored, merged, predicted alone and in a mixed batch, exported."""
    task, config, out = EXAMPLES[name], AdapterConfig(rank=2, basis="random"), tmp_path / "own.safetensors"
    adapter = train_adapter(bert, task, rows_of(name, 80), out, "lora", config, TrainConfig(epochs=2, **QUICK), SILENT)
    assert read_adapter(out).task == task
    rows = rows_of(name, 30, seed=1)
    scores = scores_of(task, rows, Predictor(adapter, bert).outputs(task.name, rows))
    assert all(score.ci_low <= score.value <= score.ci_high for score in scores)
    merged = merge([adapter, random_adapter(bert, "sst", basis="random")], Recipe("task_arithmetic"))
    predictor = Predictor(merged, bert)
    alone = predictor.predict(task.name, ["good cat", "bad dog"])
    mixed = predictor.mixed([(task.name, "good cat"), ("sst", "a film"), (task.name, "bad dog")])
    assert [one.label for one in alone] == [mixed[0].label, mixed[2].label]
    for answer in alone:
        kind_of(task).parse(task, answer.label)
    write_model(tmp_path / "m.safetensors", merged)
    again = Predictor(read_model(tmp_path / "m.safetensors"), bert)
    np.testing.assert_array_equal(again.outputs(task.name, rows), predictor.outputs(task.name, rows))
    folder = write_dense(tmp_path / "dense", merged, bert, only=[task.name])[0]  # it compares transformers' outputs
    assert read_folder(folder).task == task


@pytest.mark.parametrize("name", ["classify", "multilabel"])
def test_balancing_changes_what_is_learned(name: str, bert: mb.Encoder, tmp_path: Path) -> None:
    heads = []
    for balance in (False, True):
        train, out = TrainConfig(epochs=1, balance=balance, **QUICK), tmp_path / f"{balance}.safetensors"
        found = train_adapter(bert, EXAMPLES[name], rows_of(name, 60), out, "probe", train=train, control=SILENT)
        assert found.training.get("balance", False) is balance
        heads.append(found.head)
    assert not torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])


def test_values_cannot_be_balanced(bert: mb.Encoder, tmp_path: Path) -> None:
    train, out = TrainConfig(epochs=1, balance=True, **QUICK), tmp_path / "r.safetensors"
    with pytest.raises(TrainingError, match=r"`balance`: 'regress', which has no labels to balance"):
        train_adapter(bert, EXAMPLES["regress"], rows_of("regress", 60), out, "probe", train=train, control=SILENT)


@pytest.mark.parametrize("name", KINDS.names())
def test_it_has_a_metric_and_no_other_kind_takes_it(name: str) -> None:
    own = [metric for metric in METRICS.values() if name in metric.kinds]
    assert own
    for metric in METRICS.values():
        if name not in metric.kinds:
            with pytest.raises(DataError, match=f"a metric of a task of kind '{name}'"):
                dataclasses.replace(EXAMPLES[name], metrics=(metric.name,))


@pytest.mark.parametrize("name", KINDS.names())
def test_a_label_is_read_and_written_again(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    for cell in kind.example.cells:
        label = kind.parse(task, cell)
        assert kind.parse(task, kind.cell(task, label)) == label
    for cell in kind.example.refused:
        with pytest.raises(LabelError):
            kind.parse(task, cell)


@pytest.mark.parametrize("name", KINDS.names())
def test_a_configuration_says_its_labels_and_no_other_kind_takes_it(name: str) -> None:
    kind = KINDS.get(name)
    for other in OWN:
        task = dataclasses.replace(EXAMPLES[other], range=None)
        found = kind.labels_from_hub(kind_of(task).hub(task))
        assert found == (task.labels if name == other else None)


@pytest.mark.parametrize("name", KINDS.names())
def test_outputs_that_say_the_truth_are_decoded_to_it_and_have_the_least_loss(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    labels = [kind.parse(task, cell) for cell in kind.example.cells]
    targets = kind.targets(task, labels)
    best = outputs_of(name, len(labels)).zero_().requires_grad_()
    optimizer = torch.optim.LBFGS([best], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = kind.loss(best, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(kind.loss(best.detach(), targets)) < 0.01
    factor, offset = kind.stretch(task)
    answers = kind.decode(task, offset + factor * best.detach().numpy())
    if kind.has_probability:
        assert [answer.label for answer in answers] == [kind.cell(task, label) for label in labels]
        assert all(answer.value > 0.9 for answer in answers)
    else:
        assert [answer.value for answer in answers] == pytest.approx([kind.cell(task, one) for one in labels], abs=0.05)


@pytest.mark.parametrize("name", KINDS.names())
def test_parts_of_a_batch_add_up_to_the_batch(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    labels = [kind.parse(task, cell) for cell in kind.example.cells]
    outputs, targets, weights = outputs_of(name, len(labels)), kind.targets(task, labels), kind.weights(task, labels)
    for given in {None, weights} if weights is not None else {None}:
        whole = kind.loss(outputs, targets, given)
        rows = len(labels)
        parts = sum(kind.loss(outputs[a:b], targets[a:b], given) * (b - a) / rows for a, b in ((0, 1), (1, rows)))
        assert float(parts) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("name", KINDS.names())
def test_the_distance_is_zero_at_the_expert_alone(name: str) -> None:
    kind, truth = kind_of(EXAMPLES[name]), outputs_of(name)
    assert float(kind.distance(truth, truth, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(kind.distance(truth + outputs_of(name, seed=1), truth, 1.0)) > 0.01
    moved = truth.clone().requires_grad_()
    kind.distance(moved, truth, 1.0).backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", KINDS.names())
def test_nothing_is_lost_where_nothing_moves(name: str) -> None:
    kind, alone = kind_of(EXAMPLES[name]), outputs_of(name, 12)
    assert kind.expected_loss(alone, alone) == pytest.approx(0, abs=1e-9)
    assert kind.expected_loss(alone, outputs_of(name, 12, seed=1)) > 0


def test_the_directions_are_those_of_the_fisher_information() -> None:
    """Against ``E[s sᵀ]`` summed over every label that there is."""
    for name in ("classify", "multilabel"):
        kind, outputs = kind_of(EXAMPLES[name]), outputs_of(name, 3).double()
        found = torch.zeros(3, 3, 3, dtype=torch.float64)
        for direction in kind.directions(outputs):
            found += direction[:, :, None] * direction[:, None]
        expected = torch.zeros_like(found)
        eye = torch.eye(3, dtype=torch.float64)
        marks = eye if name == "classify" else torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
        for mark in marks:
            if name == "classify":
                chance, score = outputs.softmax(-1) @ mark, mark - outputs.softmax(-1)
            else:
                p = outputs.sigmoid()
                chance, score = torch.where(mark > 0, p, 1 - p).prod(-1), mark - p
            expected += chance[:, None, None] * score[:, :, None] * score[:, None]
        torch.testing.assert_close(found, expected)
    kind = kind_of(EXAMPLES["regress"])
    assert [direction.tolist() for direction in kind.directions(torch.zeros(2, 1))] == [[[1.0], [1.0]]]


def test_entropy_is_that_of_the_distribution() -> None:
    classify, multilabel = kind_of(EXAMPLES["classify"]), kind_of(EXAMPLES["multilabel"])
    even, sure = torch.zeros(3, 5), torch.tensor([[1000.0, 0.0, 0.0]])
    assert float(classify.entropy(even)) == pytest.approx(np.log(5))
    assert float(classify.entropy(sure)) == 0.0
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]])
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert float(classify.entropy(logits)) == pytest.approx(float(expected))
    expected = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1).mean()
    assert float(multilabel.entropy(logits)) == pytest.approx(float(expected))


def test_losses_are_those_of_the_definitions() -> None:
    chances, other = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    found = float(kind_of(EXAMPLES["classify"]).distance(other.log(), chances.log(), 1.0))
    assert found == pytest.approx(0.2 * np.log(0.2 / 0.5) + 0.8 * np.log(0.8 / 0.5), rel=1e-5)
    assert float(kind_of(EXAMPLES["regress"]).distance(torch.ones(3, 1), torch.zeros(3, 1), 4.0)) == 0.25
    truth, moved = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.5]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=truth), torch.distributions.Bernoulli(logits=moved)
    )
    assert float(kind_of(EXAMPLES["multilabel"]).distance(moved, truth, 1.0)) == pytest.approx(float(expected.sum()))
    outputs, index = outputs_of("classify"), torch.tensor([0, 1, 2, 0])
    loss = kind_of(EXAMPLES["classify"]).loss(outputs, index)
    assert float(loss) == float(torch.nn.functional.cross_entropy(outputs, index))


def test_balanced_labels_weigh_one_each() -> None:
    task, kind = EXAMPLES["classify"], kind_of(EXAMPLES["classify"])
    weights = kind.weights(task, [0.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    assert weights is not None
    assert (weights * torch.tensor([3.0, 1.0, 2.0])).tolist() == pytest.approx([2.0, 2.0, 2.0])
    marks = kind_of(EXAMPLES["multilabel"]).weights(EXAMPLES["multilabel"], [(1, 0, 0), (1, 1, 0), (1, 0, 0)])
    assert marks is not None
    assert marks.tolist() == pytest.approx([1 / 3, 2.0, 3.0])


def test_the_thresholds_of_labels_decide() -> None:
    task, kind = EXAMPLES["multilabel"], kind_of(EXAMPLES["multilabel"])
    logits = np.log(np.array([[0.55, 0.35, 0.55]]) / np.array([[0.45, 0.65, 0.45]]))
    (answer,) = kind.decode(task, logits)
    assert answer.label == "x|y"
    assert answer.value == pytest.approx(0.55 * 0.35 * 0.45)
    (answer,) = kind.decode(dataclasses.replace(task, thresholds=()), logits)
    assert answer.label == "x|z"
