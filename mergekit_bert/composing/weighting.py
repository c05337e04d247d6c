"""Learned weights: the merged model as a differentiable function of the weights, on the frozen encoder.

Every site also computes ``x Aᵀ`` with the factors of all adapters, times the weights, times ``Bᵀ``: a step costs little
more than with the bare encoder, and no matrix of the size of ``W`` is formed. The learned weights are multiplied with
those that the user gave, so that these scale the result.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.delta import factors
from mergekit_bert.adapters.patch import Part, TaskSpecific
from mergekit_bert.composing.learning import MergeObjective, descend
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.merging import finite_delta
from mergekit_bert.composing.method import Learned, LearningContext
from mergekit_bert.data.batches import Epochs, Tokens
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.option import option
from mergekit_bert.training.objective import Term

_LAST = 10
"""Number of final steps whose mean is reported as the last loss."""


@dataclass(frozen=True)
class WeightOptions:
    """The options of all methods that learn weights."""

    start: float = option(0.3, "Weight of every adapter before the first step.")
    steps: int = option(100, "Steps of the optimizer.", low=0)
    lr: float = option(1e-2, "Peak learning rate of the weights.", low=0.0)
    batch_size: int = option(8, "Rows of each task in a step.", low=1)


class _Shifted(Classifier):
    """A classifier that computes some of its parameters in every forward pass."""

    def __init__(self, inner: Classifier, values: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.inner, self.values = inner, values
        self.encoder_prefix, self.head_prefix = f"inner.{inner.encoder_prefix}", f"inner.{inner.head_prefix}"
        self.every_token, self.sequences = inner.every_token, inner.sequences

    @property
    def encoder(self) -> nn.Module:
        return self.inner.encoder

    def features(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "rows features"]:
        return self.inner.features(states)

    def forward(self, **inputs: Tensor) -> Tensor:
        values = {f"{self.inner.encoder_prefix}{name}": value for name, value in self.values().items()}
        outputs: Tensor = functional_call(self.inner, values, kwargs=inputs)
        return outputs


class Blend:
    """``W + Σ λi Δi`` at every site of the layers; sites of one ``cell`` share their weights ``λ`` (adapters, cells).

    Biases and norms have one weight an adapter in the merged file; it is the mean of ``λ`` over the cells in which
    the adapter has a site (over all, where it has none).
    """

    def __init__(
        self, encoder: Encoder, merge_inputs: Sequence[MergeInput], cell: Callable[[str], str], start: float
    ) -> None:
        """All weights are ``start``."""
        self.encoder, self.merge_inputs = encoder, merge_inputs
        self.sites = sorted({site for merge_input in merge_inputs for site in merge_input.deltas})
        cells = sorted({cell(site) for site in self.sites}) or [""]
        self.column = {site: cells.index(cell(site)) for site in self.sites}
        device = next(encoder.model.parameters()).device
        self.weights = nn.Parameter(torch.full((len(merge_inputs), len(cells)), start, device=device))
        columns = [
            {self.column[site] for site in merge_input.deltas} or range(len(cells)) for merge_input in merge_inputs
        ]
        has_cell = [[float(place in places) for place in range(len(cells))] for places in columns]
        self._own = torch.tensor(has_cell).to(device)
        self._hooks = {site: self._beside(site) for site in self.sites}
        shifted = {name for merge_input in merge_inputs for name in merge_input.shifts}
        self._shifts = {
            name: [
                (place, merge_input.shifts[name].to(device))
                for place, merge_input in enumerate(merge_inputs)
                if name in merge_input.shifts
            ]
            for name in sorted(shifted)
        }

    def mean(self) -> Float[Tensor, "adapters"]:
        """The weight of each adapter over all its cells."""
        return (self.weights * self._own).sum(1) / self._own.sum(1)

    def model(self, part: Part, own: TaskSpecific) -> Classifier:
        """The merged model with one task's parameters; it reads the weights in every forward pass."""
        folded = fold(self.encoder, own)
        inner = classifier(folded, part.task, part.head)
        model = _Shifted(inner, partial(self._shifted, dict(folded.model.named_parameters())))
        for site, hook in self._hooks.items():
            model.encoder.get_submodule(site).register_forward_hook(hook)
        return model.eval()

    def _shifted(self, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = self.mean()
        changes = {name: sum(mean[place] * shift for place, shift in parts) for name, parts in self._shifts.items()}
        return {name: old[name] + change for name, change in changes.items()}

    def _beside(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A forward hook that adds ``Σ λi Δi x`` to the output of a linear layer."""
        device, column = self.weights.device, self.column[site]
        parts = {
            place: factors(finite_delta(merge_input, site))
            for place, merge_input in enumerate(self.merge_inputs)
            if site in merge_input.deltas
        }
        b = torch.cat([part.B for part in parts.values()], 1).to(device, torch.float32)
        a = torch.cat([part.A for part in parts.values()], 0).to(device, torch.float32)
        owner = torch.tensor([place for place, part in parts.items() for _ in range(part.rank)], dtype=torch.long)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            thin = functional.linear(inputs[0], a) * self.weights[owner.to(device), column]
            return output + functional.linear(thin, b)

        return hook


@dataclass(frozen=True)
class Student:
    """The merged model with one task's head, the task's trained part, and its rows."""

    part: Part
    model: Classifier
    tokens: Tokens


Loss = Callable[[list[int]], Float[Tensor, ""]]
"""The mean loss of some rows of a task, by index."""


def learn_weights(
    context: LearningContext, title: str, cell: Callable[[str], str], loss_of: Callable[[Student], Loss]
) -> Learned:
    """Weights for every adapter and cell of sites that minimise the sum of the tasks' losses."""
    options: WeightOptions = context.options
    # Sorted, so that the order of the inputs does not change any sum.
    merge_inputs = sorted(context.merge_inputs, key=lambda merge_input: merge_input.name)
    blend = Blend(context.encoder, merge_inputs, cell, options.start)
    losses = list[float]()
    if options.steps:
        losses = descend(_TasksLoss(context, title, blend, loss_of), context.folder, context.show)
    weights = blend.weights.detach().double().cpu()
    mean = dict(zip((merge_input.name for merge_input in merge_inputs), blend.mean().tolist(), strict=True))
    layers = {
        site: {
            merge_input.name: context.weights[merge_input.name] * float(weights[place, blend.column[site]])
            for place, merge_input in enumerate(merge_inputs)
            if site in merge_input.deltas
        }
        for site in blend.sites
    }
    trace: dict[str, Any] = {
        "rows": {task: len(rows) for task, rows in context.rows.items()},
        "fingerprints": {task: rows.fingerprint() for task, rows in context.rows.items()},
    }
    if losses:
        trace |= {"first_loss": losses[0], "last_loss": sum(losses[-_LAST:]) / len(losses[-_LAST:])}
    return Learned({name: context.weights[name] * value for name, value in mean.items()}, layers, trace=trace)


class _TasksLoss(MergeObjective):
    """The sum of the tasks' losses, each on a batch of its rows, as a function of the weights."""

    def __init__(self, context: LearningContext, title: str, blend: Blend, loss_of: Callable[[Student], Loss]) -> None:
        options: WeightOptions = context.options
        super().__init__(title, {"weights": blend.weights}, options.steps, options.lr, _key(context, title))
        students = [
            _student(context, blend, merge_input, task)
            for merge_input in blend.merge_inputs
            for task in sorted(merge_input.parts)
        ]
        self.tasks = [
            (loss_of(student), Epochs(student.tokens, options.batch_size, context.seed), student.tokens)
            for student in students
        ]
        self.weights = blend.weights

    def terms(self, step: int) -> Iterator[Term]:
        for loss, batches, tokens in self.tasks:
            index = batches.rows(step)
            for run in tokens.cut(index):
                yield _term(loss, run, len(run) / len(index), self.weights)


def _term(loss: Loss, run: list[int], share: float, weights: Tensor) -> Term:
    """A part of a step's loss that always has a gradient: zero if it does not depend on any weight."""
    return lambda: share * loss(run) + 0 * weights.sum()


def _student(context: LearningContext, blend: Blend, merge_input: MergeInput, task: str) -> Student:
    part = merge_input.part(task)
    return Student(part, blend.model(part, merge_input.own[task]), part.tokens(context.encoder, context.rows[task]))


def _key(context: LearningContext, title: str) -> Mapping[str, Any]:
    """Everything that determines a run."""
    return {
        "method": title,
        "options": dataclasses.asdict(context.options),
        "seed": context.seed,
        "base": context.encoder.fingerprint,
        "inputs": [merge_input.identify() for merge_input in context.merge_inputs],
        "rows": {task: rows.fingerprint() for task, rows in context.rows.items()},
    }


def layer_of(site: str) -> int | None:
    """The number of the layer that a site is in; None outside the layers."""
    return next((int(word) for word in site.split(".") if word.isdigit()), None)
