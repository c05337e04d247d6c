"""Distillation as a merge: the merged factors are fitted to the answers of each task's expert.

Start from a data-free merge, then fit the merged factors on unlabelled rows so that the states of all tokens after
every layer (as in TinyBERT, Jiao et al. 2020, arXiv 1909.10351), the features that the head uses, and the outputs match
those of each task's expert. The states of all tokens carry far more information than the features. Gradients pass
through all layers, or with ``local`` through one: Xu et al. 2025 (ProDistill, arXiv 2502.12706) fit one layer after the
other from the lowest; here all are fitted at once. Every task keeps its head and the pooler before it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.attach import attach, cast_frozen, copies, fold
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta, LowRank, delta_of, svd
from mergekit_bert.adapters.families import lora
from mergekit_bert.adapters.patch import Part, Patch
from mergekit_bert.composing.learning import Answers, FeatureExtractor, MergeObjective, descend
from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.merging import merged_shifts
from mergekit_bert.composing.method import Learned, LearningContext, Method
from mergekit_bert.data.batches import Epochs, Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.errors import CompositionError
from mergekit_bert.hardware import autocast, default_device, generator, pick_precision
from mergekit_bert.option import option
from mergekit_bert.training.objective import Term

_STARTS = ("task_arithmetic", "tsv", "ties", "fedavg", "orthoada")
_SAMPLE = 64
"""Rows of a task on which the variance of its expert's answers is measured."""
_KEPT_BYTES = 2**28
"""The experts' answers for all rows are computed in advance if they take at most this; otherwise in every step."""


@dataclass(frozen=True)
class _Options:
    steps: int = option(160, "Steps of the optimizer.", low=0)
    batch_size: int = option(16, "Rows of each task in a step.", low=1)
    lr: float = option(2e-3, "Peak learning rate of the merged factors.", low=0.0)
    layers: float = option(2.0, "Weight of the states after the layers in the loss, all layers together.", low=0.0)
    features: float = option(1.0, "Weight of the features that the head reads.", low=0.0)
    outputs: float = option(0.3, "Weight of the outputs.", low=0.0)
    local: bool = option(False, "Fit each layer to its own states alone: no gradient passes to the layers below.")
    start: str = option("task_arithmetic", "The merge to start from.", choices=_STARTS)
    precision: str = option("auto", "auto, fp32 or bf16, as in training.", choices=("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class _Expert:
    """The answers of a task's expert for its rows: computed in advance, or on demand."""

    extractor: FeatureExtractor
    tokens: Tokens
    dtype: torch.dtype
    kept: Mapping[int, Answers] = dataclasses.field(default_factory=dict)

    def __call__(self, run: list[int]) -> Answers:
        if not self.kept:
            return self._ask(run)
        found = [self.kept[row] for row in run]
        hidden = [torch.cat(states).float() for states in zip(*(one.hidden for one in found), strict=True)]
        return Answers(
            torch.stack([one.features[0] for one in found]), torch.stack([one.outputs[0] for one in found]), hidden
        )

    @torch.no_grad()
    def _ask(self, run: list[int]) -> Answers:
        with autocast(self.dtype, next(self.extractor.model.parameters()).device):
            return self.extractor(self.tokens.batch(run))

    def keeping(self) -> "_Expert":
        """The same expert with the answers for all rows computed in advance, always in the same order."""
        kept = {}
        for batch in self.tokens.in_order():
            found = self._ask(batch.index)
            states = [state.to(self.dtype).split(batch.row_lengths) for state in found.hidden]
            for place, row in enumerate(batch.index):
                own = [state[place].clone() for state in states]
                kept[row] = Answers(found.features[place, None], found.outputs[place, None], own)
        return dataclasses.replace(self, kept=kept)

    def spreads(self) -> tuple[float, float, list[float]]:
        """Mean variances of outputs, features and each layer's states over some rows: the units of their distances."""
        sample = list(range(0, len(self.tokens), -(-len(self.tokens) // _SAMPLE)))
        found = [self(run) for run in self.tokens.cut(sample)]
        hidden = [torch.cat(states) for states in zip(*(one.hidden for one in found), strict=True)]
        features, outputs = (torch.cat([getattr(one, name) for one in found]) for name in ("features", "outputs"))
        return _spread(outputs), _spread(features), [_spread(states) for states in hidden]


def _spread(values: Float[Tensor, "rows width"]) -> float:
    """Mean variance of the columns; of a single row, or of equal ones, the mean square."""
    variance = float(values.var(0, correction=0).mean())
    return variance if variance > 0 else float(values.square().mean()) or 1.0


@dataclass(frozen=True)
class _Student:
    """The student model of one task, and its expert's answers for the rows."""

    task: Task
    extractor: FeatureExtractor
    expert: _Expert
    spreads: tuple[float, float, list[float]]
    batches: Epochs

    def terms(self, options: _Options, step: int) -> list[Term]:
        """The loss on this step's rows, within the token budget."""
        index = self.batches.rows(step)
        return [partial(self._loss, run, options, len(index)) for run in self.expert.tokens.cut(index)]

    def _loss(self, run: list[int], options: _Options, rows: int) -> Float[Tensor, ""]:
        expected = self.expert(run)
        with autocast(self.expert.dtype, expected.features.device):
            answers = self.extractor(self.expert.tokens.batch(run))
        of_outputs, of_features, of_states = self.spreads
        loss = options.features * functional.mse_loss(answers.features, expected.features) / of_features
        if options.outputs:
            loss = loss + options.outputs * kind_of(self.task).distance(
                self.task, answers.outputs, expected.outputs, of_outputs
            )
        if answers.hidden:
            pairs = zip(answers.hidden, expected.hidden, of_states, strict=True)
            apart = torch.stack([functional.mse_loss(one, two) / spread for one, two, spread in pairs])
            loss = loss + options.layers * apart.mean()
        return loss * (len(run) / rows)


class _Distillation(MergeObjective):
    """The sum over the tasks of the distances from their experts, as a function of the merged factors."""

    def __init__(
        self, context: LearningContext, dtype: str, factors: Mapping[str, nn.Parameter], students: Sequence[_Student]
    ) -> None:
        super().__init__("distill", factors, context.options.steps, context.options.lr, _key(context, dtype))
        self.options, self.students = context.options, students

    def terms(self, step: int) -> Iterator[Term]:
        for student in self.students:
            yield from student.terms(self.options, step)


def _learn(context: LearningContext) -> Learned:
    """Fit the factors of the start to the experts."""
    options: _Options = context.options
    deltas = context.merge(options.start)
    factors = {site: _balanced(site, delta, context.rank) for site, delta in deltas.items()}
    if options.steps == 0 or not any(delta.rank for delta in factors.values()):
        return Learned(deltas=factors)
    parts = {task: merge_input.part(task) for merge_input in context.merge_inputs for task in merge_input.parts}
    tokens = {task: _tokens(context, part) for task, part in parts.items()}
    dtype = pick_precision(options.precision, default_device())
    known = copies(context.encoder.model, dtype)
    experts = {task: _expert(context, part, tokens[task], dtype, known) for task, part in parts.items()}
    if sum(map(_bytes, experts.values())) <= _KEPT_BYTES:
        experts = {task: expert.keeping() for task, expert in experts.items()}
    extractors, placed = _student(context, parts, factors, dtype, known)
    students = [
        _Student(
            part.task,
            extractors[task],
            experts[task],
            experts[task].spreads(),
            Epochs(tokens[task], options.batch_size, context.seed),
        )
        for task, part in parts.items()
    ]
    losses = descend(_Distillation(context, str(dtype), placed, students), context.folder, context.show)
    learned: dict[str, Delta] = {
        site: delta_of({name: placed[f"{site}.{name}"].detach().cpu() for name in delta.tensors()})
        if delta.rank
        else delta
        for site, delta in factors.items()
    }
    tail = losses[-10:]
    trace = {
        "rows": {task: len(rows) for task, rows in tokens.items()},
        "fingerprints": {task: context.rows[task].fingerprint() for task in tokens},
        "first_loss": losses[0],
        "last_loss": sum(tail) / len(tail),
        "precision": str(dtype).removeprefix("torch."),
    }
    return Learned(deltas=learned, trace=trace)


def _balanced(site: str, delta: Delta, rank: int | None) -> LowRank:
    """``U √S`` and ``√S Vᵀ`` of the strongest directions: factors of one size learn at one pace."""
    if rank is None and delta.rank is None:
        raise CompositionError(
            f"distill, site {site!r}", "a dense start", "factors to learn", "give `rank`, or another start"
        )
    u, values, vh = svd(delta)
    root = values[:rank].sqrt()
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())


def _student(
    context: LearningContext,
    parts: Mapping[str, Part],
    factors: Mapping[str, LowRank],
    dtype: torch.dtype,
    known: Mapping[int, nn.Parameter],
) -> tuple[dict[str, FeatureExtractor], dict[str, nn.Parameter]]:
    """A classifier for every task over one tree with the factors beside it, and the factors to train."""
    options: _Options = context.options
    shifts = merged_shifts(context.merge_inputs, context.weights)
    shared = fold(context.encoder, Patch(shifts=shifts))
    first = next(iter(parts.values()))
    model = classifier(shared, first.task, first.head)
    config = AdapterConfig(rank=1, alpha=1.0)  # a scale of 1: the factors are the Delta
    values = {site: delta.tensors() for site, delta in factors.items() if delta.rank}
    placed = attach(model, lora.RECORD.name, values, frozenset(), config, generator(0))
    cast_frozen(model.encoder, dtype, known)
    tree = dataclasses.replace(shared, model=model.encoder)
    owns = {task: own for one in context.merge_inputs for task, own in one.own.items()}
    extractors = {
        task: FeatureExtractor(
            classifier(fold(tree, owns[task]), part.task, part.head),
            hidden=options.layers > 0,
            local=options.local,
        )
        for task, part in parts.items()
    }
    parameters = {f"{site}.{name}": parameter for site, both in placed.items() for name, parameter in both.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)  # a classifier freezes all that it is given
    return extractors, parameters


def _expert(
    context: LearningContext, part: Part, tokens: Tokens, dtype: torch.dtype, known: Mapping[int, nn.Parameter]
) -> _Expert:
    model = classifier(fold(context.encoder, part), part.task, part.head)
    cast_frozen(model.encoder, dtype, known)
    return _Expert(FeatureExtractor(model, hidden=context.options.layers > 0), tokens, dtype)


def _bytes(expert: _Expert) -> int:
    """What the answers for all rows would take."""
    config: Any = expert.extractor.model.encoder.config
    layers = (config.num_hidden_layers - 1) if expert.extractor.hidden else 0
    tokens = sum(map(expert.tokens.length, range(len(expert.tokens))))
    size: int = tokens * layers * config.hidden_size * expert.dtype.itemsize
    return size


def _tokens(context: LearningContext, part: Part) -> Tokens:
    return part.tokens(context.encoder, context.rows[part.task.name])


def _key(context: LearningContext, dtype: str) -> dict[str, object]:
    """Everything that determines the run."""
    return {
        "options": dataclasses.asdict(context.options),
        "weights": dict(context.weights),
        "rank": context.rank,
        "seed": context.seed,
        "dtype": dtype,
        "base": context.encoder.fingerprint,
        "inputs": [one.identify() for one in context.merge_inputs],
        "rows": {task: rows.fingerprint() for task, rows in context.rows.items()},
    }


def _half(merge_inputs: Sequence[MergeInput]) -> list[float]:
    return [0.5 if len(merge_inputs) > 1 else 1.0] * len(merge_inputs)


RECORD = Method(
    name="distill",
    description="fit the merged factors to every expert's states, features and outputs, on rows without labels",
    formula="min over B, A of Σi E[α meanₗ ‖hₗ(x; B A) − hₗ(x; Δi)‖² / var hₗ + β ‖f − fi‖² / var fi + γ D(y, yi)]",
    source="arXiv 2502.12706",
    merge=weighted_sum,
    weights=_half,
    default_weights="0.5 each (of the start; 1 for a single adapter)",
    options=_Options,
    needs=("rows",),
    rows=4096,
    spaces=("full",),
    learn=_learn,
    random=True,
    one_stays={"steps": 0},
)
