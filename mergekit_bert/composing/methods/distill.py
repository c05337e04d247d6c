"""Distillation as a merge: merged factors that give each task the answers of its expert.

Start from a data-free merge, then fit the merged factors on rows without labels so that features and outputs are
those of each task's expert (Xu et al. 2025, ProDistill, arXiv 2502.12706, who fit layer by layer). Every task keeps its
head and what lies between the layers and it; the experts' answers are computed once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.adapter import Part
from mergekit_bert.adapters.attach import attach, cast_frozen, fold
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import Delta, LowRank, svd
from mergekit_bert.composing.ingredient import Ingredient, identity
from mergekit_bert.composing.learning import Answers, Reader, descend, expert_answers
from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.merging import merged_shifts
from mergekit_bert.composing.method import Learned, Lesson, Method
from mergekit_bert.data.batches import Tokens, tokenise
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.heads import classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.hardware import autocast, default_device, generator, pick_precision
from mergekit_bert.option import option

_STARTS = ("task_arithmetic", "tsv", "ties", "fedavg", "orthoada")


@dataclass(frozen=True)
class _Options:
    steps: int = option(150, "Steps of the optimizer.", low=0)
    batch_size: int = option(32, "Rows of each task in a step.", low=1)
    lr: float = option(2e-3, "Peak learning rate of the merged factors.", low=0.0)
    features: float = option(1.0, "Weight of the features beside the outputs in the loss.", low=0.0)
    start: str = option("task_arithmetic", "The merge to start from.", choices=_STARTS)
    precision: str = option("auto", "auto, fp32 or bf16, as in training.", choices=("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class _Pupil:
    """One task of the student, and what its expert says of its rows."""

    task: Task
    reader: Reader
    tokens: Tokens
    expert: Answers
    spread: Float[Tensor, ""]
    """Mean variance of the expert's features: the unit of their distance."""

    def terms(
        self, options: _Options, seed: int, step: int, dtype: torch.dtype
    ) -> list[Callable[[], Float[Tensor, ""]]]:
        """The loss on this step's rows, within the token budget."""
        index = self._rows(options.batch_size, seed, step)
        return [lambda run=run: self._loss(run, options, len(index), dtype) for run in self.tokens.cut(index)]  # type: ignore[misc]

    def _rows(self, size: int, seed: int, step: int) -> list[int]:
        """Rows of like length, all of them once before any comes again: a function of the step alone."""
        per_epoch = -(-len(self.tokens) // size)
        return self.tokens.shuffled(size, seed, step // per_epoch)[step % per_epoch]

    def _loss(self, run: list[int], options: _Options, rows: int, dtype: torch.dtype) -> Float[Tensor, ""]:
        device = self.expert.features.device
        with autocast(dtype, device):
            found = self.reader(self.tokens.batch(run))
        truth = self.expert.take(run)
        apart = functional.mse_loss(found.features, truth.features) / self.spread
        loss = options.features * apart + output_loss(self.task, found.outputs, truth.outputs)
        return loss * (len(run) / rows)


def output_loss(task: Task, found: Float[Tensor, "rows out"], truth: Float[Tensor, "rows out"]) -> Float[Tensor, ""]:
    """How far outputs are from the expert's: the Kullback-Leibler divergence of classes, or the squared distance."""
    if task.kind == "classify":
        chances = functional.log_softmax(truth, -1)
        return functional.kl_div(functional.log_softmax(found, -1), chances, reduction="batchmean", log_target=True)
    return functional.mse_loss(found, truth)


def _learn(lesson: Lesson) -> Learned:
    """Fit the factors of the start to the experts."""
    options: _Options = lesson.options
    deltas = lesson.merge(options.start)
    factors = {site: _balanced(site, delta, lesson.rank) for site, delta in deltas.items()}
    if options.steps == 0:
        return Learned(deltas=factors)
    parts = {task: one.model.part(task) for one in lesson.ingredients for task in one.parts}
    tokens = {task: _tokens(lesson, part) for task, part in parts.items()}
    experts = {task: expert_answers(lesson.encoder, part, tokens[task]) for task, part in parts.items()}
    dtype = pick_precision(options.precision, default_device())
    readers, placed = _student(lesson, parts, factors, dtype)
    pupils = [
        _Pupil(part.task, readers[task], tokens[task], experts[task], experts[task].features.var(0).mean() + 1e-12)
        for task, part in parts.items()
    ]
    losses = descend(
        placed,
        lambda step: [term for pupil in pupils for term in pupil.terms(options, lesson.seed, step, dtype)],
        options.steps,
        options.lr,
        _key(lesson, str(dtype)),
        lesson.folder,
        lesson.show,
        "distill",
    )
    learned: dict[str, Delta] = {
        site: LowRank(placed[f"{site}.B"].detach().cpu(), placed[f"{site}.A"].detach().cpu()) if delta.rank else delta
        for site, delta in factors.items()
    }
    tail = losses[-10:]
    trace = {
        "rows": {task: len(one) for task, one in tokens.items()},
        "fingerprints": {task: lesson.rows[task].fingerprint() for task in tokens},
        "first_loss": losses[0],
        "last_loss": sum(tail) / len(tail),
        "precision": str(dtype).removeprefix("torch."),
    }
    return Learned(deltas=learned, trace=trace)


def _balanced(site: str, delta: Delta, rank: int | None) -> LowRank:
    """``U √S`` and ``√S Vᵀ`` of the strongest directions: factors of one size learn at one pace."""
    if rank is None and not isinstance(delta, LowRank):
        raise CompositionError(
            f"distill, site {site!r}", "a dense start", "factors to learn", "give --rank, or another start"
        )
    u, values, vh = svd(delta)
    root = values[:rank].sqrt()
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())


def _student(
    lesson: Lesson, parts: Mapping[str, Part], factors: Mapping[str, LowRank], dtype: torch.dtype
) -> tuple[dict[str, Reader], dict[str, nn.Parameter]]:
    """A classifier for every task over one tree with the factors beside it, and the factors to train."""
    shifts = merged_shifts(lesson.ingredients, lesson.weights)
    shared = fold(lesson.encoder, {}, shifts)
    first = next(iter(parts.values()))
    model = classifier(shared, first.task, first.head)
    config = AdapterConfig(rank=1, alpha=1.0)  # a scale of 1: the factors are the Delta
    values = {site: {"A": delta.A, "B": delta.B} for site, delta in factors.items() if delta.rank}
    placed = attach(model, "lora", values, frozenset(), config, generator(0))
    cast_frozen(model.encoder, dtype)
    tree = dataclasses.replace(shared, model=model.encoder)
    owns = {task: own for one in lesson.ingredients for task, own in one.own.items()}
    readers = {
        task: Reader(classifier(fold(tree, owns[task].deltas, owns[task].shifts), part.task, part.head))
        for task, part in parts.items()
    }
    found = {f"{site}.{name}": parameter for site, both in placed.items() for name, parameter in both.items()}
    for parameter in found.values():
        parameter.requires_grad_(True)  # a classifier freezes all that it is given
    return readers, found


def _tokens(lesson: Lesson, part: Part) -> Tokens:
    encoder: Encoder = lesson.encoder
    return tokenise(lesson.rows[part.task.name], part.task, encoder.tokenizer, part.max_length, encoder.pad_token)


def _key(lesson: Lesson, dtype: str) -> dict[str, object]:
    """Everything that determines the run."""
    return {
        "options": dataclasses.asdict(lesson.options),
        "weights": dict(lesson.weights),
        "rank": lesson.rank,
        "seed": lesson.seed,
        "dtype": dtype,
        "base": lesson.encoder.fingerprint,
        "inputs": [identity(one) for one in lesson.ingredients],
        "rows": {task: rows.fingerprint() for task, rows in lesson.rows.items()},
    }


def _half(ingredients: Sequence[Ingredient]) -> list[float]:
    return [0.5 if len(ingredients) > 1 else 1.0] * len(ingredients)


RECORD = Method(
    name="distill",
    description="fit the merged factors to every expert's features and outputs, on rows without labels",
    formula="min over B, A of Σi E[‖f(x; B A) − f(x; Δi)‖² / var f + D(outputs, outputs of expert i)]",
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
