"""What every kind of task must keep to, on one small task of each kind."""

import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.file import read_adapter
from mergekit_bert.composing.merging import MergeContext, merge
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.kind import KINDS, HubFields, Label, LabelError, kind_of
from mergekit_bert.data.metric import METRICS, Metric, metric
from mergekit_bert.data.rows import Rows, given_rows
from mergekit_bert.data.task import Task, task_from_hub
from mergekit_bert.encoder.folder import read_folder
from mergekit_bert.encoder.head import head_config
from mergekit_bert.errors import DataError, TrainingError
from mergekit_bert.evaluation.scores import score_task, write_predictions
from mergekit_bert.formats.checkpoint import read_checkpoint
from mergekit_bert.formats.dense import write_dense
from mergekit_bert.formats.file import read_model, write_model
from mergekit_bert.models.prediction import Predictor, mixed_table, predict_table
from mergekit_bert.registry import names_in
from mergekit_bert.training.config import TrainConfig
from mergekit_bert.training.manifest import Control
from mergekit_bert.training.run import train_adapter
from tests.adapters.helpers import random_adapter
from tests.tiny import WORDS, tiny_rows

EXAMPLES = {
    kind.name: Task(**{"name": kind.name, "kind": kind.name, "text": ("a",), **kind.example.fields}) for kind in KINDS
}
OWN = names_in("mergekit_bert.data.kinds")


def outputs_of(name: str, rows: int = 4, seed: int = 0) -> torch.Tensor:
    width = kind_of(EXAMPLES[name]).outputs(EXAMPLES[name])
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rows_of(name: str, count: int, seed: int = 0) -> Rows:
    """Rows whose label follows from the words."""
    task, source = EXAMPLES[name], random.Random(seed)
    texts = [tuple(" ".join(source.choices(WORDS, k=source.randint(2, 9))) for _ in task.text) for _ in range(count)]
    cells = kind_of(task).example.cells
    marks = [("good" in row[0]) + ("cat" in row[0]) + ("film" in row[0]) for row in texts]
    labels: list[Label] = [kind_of(task).parse(task, cells[mark % len(cells)]) for mark in marks]
    return Rows(tuple(texts), tuple(labels), f"tiny {task.name}")


QUICK = {"batch_size": 8, "max_length": 40, "precision": "fp32"}
SILENT = Control(show=False)


@pytest.fixture(scope="module")
def trained(bert: mb.Encoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    """An adapter of each kind, trained when it is first asked for and read from its file."""
    folder, config = tmp_path_factory.mktemp("kinds"), AdapterConfig(rank=2, basis="random")

    @functools.cache
    def of(name: str) -> Adapter:
        task, out = EXAMPLES[name], folder / f"{name}.safetensors"
        train = TrainConfig(epochs=2, head=kind_of(task).example.head, **QUICK)
        train_adapter(bert, task, rows_of(name, 80), out, "lora", config, train, SILENT)
        return read_adapter(out)

    return of


@pytest.mark.parametrize("name", KINDS.names())
def test_it_goes_the_whole_way(name: str, bert: mb.Encoder, trained: Callable[[str], Adapter], tmp_path: Path) -> None:
    """Trained, saved, reloaded, scored, merged, predicted alone and in a mixed batch, exported, and merged again."""
    task, adapter = EXAMPLES[name], trained(name)
    assert adapter.task == task
    rows = rows_of(name, 30, seed=1)
    result = score_task(Predictor(adapter, bert), task, rows)
    assert [score.metric for score in result.scores] == list(task.metrics)
    assert all(score.ci_low <= score.value <= score.ci_high for score in result.scores)
    write_predictions(tmp_path / "predictions.tsv", result)
    header, *lines = [line.split("\t") for line in (tmp_path / "predictions.tsv").read_text().splitlines()]
    assert header == ["row", "label", "prediction", *_headings(task)]
    np.testing.assert_allclose(np.array([line[3:] for line in lines], dtype=float), result.outputs, rtol=1e-6)
    merged = merge([adapter, random_adapter(bert, "sst", basis="random")], Recipe("task_arithmetic"))
    predictor = Predictor(merged, bert)
    texts = [("good cat",) * len(task.text), ("bad dog",) * len(task.text)]
    table = predict_table(predictor, task, given_rows("texts", texts))
    with_names = mixed_table(predictor, [(name, row) for row in texts])
    for line, same in zip(table.splitlines()[1:], with_names.splitlines()[1:], strict=True):
        assert line.split("\t")[len(task.text) :] == [cell for cell in same.split("\t")[1:] if cell]
    alone = predictor.predict(task.name, texts)
    mixed = predictor.mixed([(task.name, texts[0]), ("sst", "a film"), (task.name, texts[1])])
    assert [one.label for one in alone] == [mixed[0].label, mixed[2].label]
    for answer in alone:
        kind_of(task).parse(task, answer.label)
    write_model(tmp_path / "m.safetensors", merged)
    again = Predictor(read_model(tmp_path / "m.safetensors"), bert)
    np.testing.assert_array_equal(again.outputs(task.name, rows), predictor.outputs(task.name, rows))
    folder = write_dense(tmp_path / "dense", merged, bert, only=[task.name])[0]  # it compares transformers' outputs
    assert read_folder(folder).task == task
    whole = merge([read_checkpoint(folder)], Recipe("task_arithmetic"))
    np.testing.assert_allclose(
        Predictor(whole, bert).outputs(name, rows), predictor.outputs(name, rows), atol=1e-4, rtol=1e-4
    )


def _headings(task: Task) -> list[str]:
    return [f"output_{name}" if name else "output" for name in kind_of(task).output_names(task)]


@pytest.mark.parametrize("method", ["distill", "adamerging"])
@pytest.mark.parametrize("name", KINDS.names())
def test_a_merge_that_learns_comes_nearer_to_what_it_wants(
    name: str, bert: mb.Encoder, trained: Callable[[str], Adapter], method: str
) -> None:
    adapters = [trained(name), random_adapter(bert, "sst", basis="random")]
    rows = {name: dataclasses.replace(rows_of(name, 24), labels=None), "sst": tiny_rows(mb.get_task("sst"), 24)}
    context = MergeContext(lambda: bert, lambda task: rows[task])
    options = {"steps": 12, "batch_size": 24, "lr": 0.01, "precision": "fp32"}
    known = {one.name for one in dataclasses.fields(METHODS.get(method).options)}
    options = {key: value for key, value in options.items() if key in known}
    learned = merge(adapters, Recipe(method, options=options), context).trace["learned"]
    assert learned["last_loss"] < learned["first_loss"]


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
def test_it_takes_the_metrics_that_it_names_and_no_other(name: str) -> None:
    kind = KINDS.get(name)
    assert kind.metrics
    for one in METRICS:
        if one.name in kind.metrics:
            assert dataclasses.replace(EXAMPLES[name], metrics=(one.name,)).metric == one.name
        else:
            with pytest.raises(DataError, match=f"{one.name}'; expected a metric of a task of kind '{name}'"):
                dataclasses.replace(EXAMPLES[name], metrics=(one.name,))


@pytest.mark.parametrize("name", KINDS.names())
def test_the_truth_scores_best_on_every_metric(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    rows = rows_of(name, 40)
    assert rows.labels is not None
    true = kind.truth(task, rows.labels)
    predicted = kind.predicted(task, outputs_of(name, 40).numpy())
    assert predicted.shape == true.shape == rows.label_column(task).shape
    for one in map(metric, kind.metrics):
        assert one.value(true, predicted) < one.value(true, true)


def test_a_metric_may_say_itself_that_it_fits_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS, "_added", {})
    mb.register(Metric("balanced", metric("accuracy").of, kinds=("classify",)))
    assert dataclasses.replace(EXAMPLES["classify"], metrics=("f1", "balanced")).metrics == ("f1", "balanced")
    with pytest.raises(DataError, match="a metric of a task of kind 'regress'"):
        dataclasses.replace(EXAMPLES["regress"], metrics=("balanced",))


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
        found = kind.from_hub(kind_of(task).to_hub(task))
        assert (found is None) is (name != other)


@pytest.mark.parametrize("name", KINDS.names())
def test_a_transformers_configuration_keeps_the_task(name: str, bert: mb.Encoder, tmp_path: Path) -> None:
    """As far as transformers has a place for it: written to ``config.json`` and read as a stranger's."""
    task = EXAMPLES[name]
    head_config(bert.config, task).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == task.outputs == len(kind_of(task).output_names(task))
    found = task_from_hub(name, HubFields(config.id2label, config.problem_type or "", config.to_dict()))
    assert (found.outputs, found.labels) == (task.outputs, task.labels)
    assert found.kind == name or kind_of(task).from_hub(kind_of(task).to_hub(task)) is None
    assert kind_of(found).fits(metric(found.metric))


@pytest.mark.parametrize("name", KINDS.names())
def test_outputs_that_say_the_truth_are_decoded_to_it_and_have_the_least_loss(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    labels = [kind.parse(task, cell) for cell in kind.example.cells]
    targets = kind.targets(task, labels)
    best = outputs_of(name, len(labels)).zero_().requires_grad_()
    optimizer = torch.optim.LBFGS([best], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = kind.loss(task, best, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(kind.loss(task, best.detach(), targets)) < 0.01
    factor, offset = kind.stretch(task)
    answers = kind.decode(task, offset + factor * best.detach().numpy())
    np.testing.assert_allclose([kind.parse(task, answer.label) for answer in answers], labels, atol=0.05)
    columns = kind.predicted(task, offset + factor * best.detach().numpy()), kind.truth(task, labels)
    np.testing.assert_allclose(*columns, atol=0.05)
    for answer in answers:
        assert len(answer.outputs) == kind.outputs(task)
        assert (answer.probability is not None) is kind.has_probability
        assert not kind.has_probability or answer.value == answer.probability > 0.9


@pytest.mark.parametrize("name", KINDS.names())
def test_parts_of_a_batch_add_up_to_the_batch(name: str) -> None:
    task, kind = EXAMPLES[name], kind_of(EXAMPLES[name])
    labels = [kind.parse(task, cell) for cell in kind.example.cells]
    outputs, targets, weights = outputs_of(name, len(labels)), kind.targets(task, labels), kind.weights(task, labels)
    for given in {None, weights} if weights is not None else {None}:
        whole = kind.loss(task, outputs, targets, given)
        rows = len(labels)
        parts = sum(kind.loss(task, outputs[a:b], targets[a:b], given) * (b - a) / rows for a, b in ((0, 1), (1, rows)))
        assert float(parts) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("name", KINDS.names())
def test_the_distance_is_zero_at_the_expert_alone(name: str) -> None:
    task, kind, truth = EXAMPLES[name], kind_of(EXAMPLES[name]), outputs_of(name)
    assert float(kind.distance(task, truth, truth, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(kind.distance(task, truth + outputs_of(name, seed=1), truth, 1.0)) > 0.01
    moved = truth.clone().requires_grad_()
    kind.distance(task, moved, truth, 1.0).backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", KINDS.names())
def test_the_distance_is_curved_like_the_fisher_information(name: str) -> None:
    """Of a Kullback-Leibler divergence that is so; of values it is the squared difference by 2 (of unit variance)."""
    task, kind, truth = EXAMPLES[name], kind_of(EXAMPLES[name]), outputs_of(name, 1).double()
    found = torch.autograd.functional.hessian(lambda moved: kind.distance(task, moved, truth, 2.0), truth)
    directions = torch.cat(kind.directions(task, truth))
    torch.testing.assert_close(found.squeeze(), (directions.T @ directions).squeeze(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS.names())
def test_nothing_is_lost_where_nothing_moves(name: str) -> None:
    task, kind, alone = EXAMPLES[name], kind_of(EXAMPLES[name]), outputs_of(name, 12)
    assert kind.expected_loss(task, alone, alone) == pytest.approx(0, abs=1e-9)
    assert kind.expected_loss(task, alone, outputs_of(name, 12, seed=1)) > 0


def test_the_directions_are_those_of_the_fisher_information() -> None:
    """Against ``E[s sᵀ]`` summed over every label that there is."""
    for name in ("classify", "multilabel"):
        task, kind, outputs = EXAMPLES[name], kind_of(EXAMPLES[name]), outputs_of(name, 3).double()
        found = torch.zeros(3, 3, 3, dtype=torch.float64)
        for direction in kind.directions(task, outputs):
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
    task = EXAMPLES["regress"]
    assert [one.tolist() for one in kind_of(task).directions(task, torch.zeros(2, 1))] == [[[1.0], [1.0]]]


def test_entropy_is_that_of_the_distribution() -> None:
    classify, multilabel = kind_of(EXAMPLES["classify"]), kind_of(EXAMPLES["multilabel"])
    even, sure = torch.zeros(3, 5), torch.tensor([[1000.0, 0.0, 0.0]])
    assert float(classify.entropy(EXAMPLES["classify"], even)) == pytest.approx(np.log(5))
    assert float(classify.entropy(EXAMPLES["classify"], sure)) == 0.0
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]])
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert float(classify.entropy(EXAMPLES["classify"], logits)) == pytest.approx(float(expected))
    expected = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1).mean()
    assert float(multilabel.entropy(EXAMPLES["multilabel"], logits)) == pytest.approx(float(expected))


def test_losses_are_those_of_the_definitions() -> None:
    classify, regress, multilabel = (EXAMPLES[name] for name in ("classify", "regress", "multilabel"))
    chances, other = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    found = float(kind_of(classify).distance(classify, other.log(), chances.log(), 1.0))
    assert found == pytest.approx(0.2 * np.log(0.2 / 0.5) + 0.8 * np.log(0.8 / 0.5), rel=1e-5)
    assert float(kind_of(regress).distance(regress, torch.ones(3, 1), torch.zeros(3, 1), 4.0)) == 0.25
    truth, moved = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.5]])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=truth), torch.distributions.Bernoulli(logits=moved)
    )
    assert float(kind_of(multilabel).distance(multilabel, moved, truth, 1.0)) == pytest.approx(float(expected.sum()))
    outputs, index = outputs_of("classify"), torch.tensor([0, 1, 2, 0])
    loss = kind_of(classify).loss(classify, outputs, index)
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
