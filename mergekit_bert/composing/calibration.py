"""Calibration of a merged model on rows of each task, as separate steps after the merge.

``heads`` refits every task's head to the merged model's features, on labelled rows. ``scales`` scales the merged Delta
of each site so that it changes the layer's outputs as much as the experts' own Deltas do, on unlabelled rows.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.delta import energy
from mergekit_bert.adapters.family import Tensors
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.adapters.patch import Part
from mergekit_bert.adapters.statistics import Gram
from mergekit_bert.composing.merge_input import MergeInput
from mergekit_bert.composing.private import residuals
from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.metric import metric
from mergekit_bert.data.rows import Rows, shuffled
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.classifier import bare_head
from mergekit_bert.encoder.forward import encode
from mergekit_bert.encoder.head import Classifier, head_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, DataError
from mergekit_bert.models.composition import Merged
from mergekit_bert.progress import progress_bar
from mergekit_bert.registry import unknown

STEPS = ("scales", "heads")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the penalty ``‖θ − θ₀‖²`` on changes of a head, added to the mean loss."""
FOLDS = 5
_FEWEST = 2 * FOLDS
_ITERATIONS = 100


@dataclass(frozen=True)
class Features:
    """The inputs of a head, in float64.

    ``hidden`` is the first token of each sequence of a row (or the mean, if the head uses that), ``pooled`` the output
    of a pooler inside the encoder.
    """

    hidden: Float[Tensor, "rows sequences width"]
    pooled: Float[Tensor, "rows width"] | None

    def take(self, rows: Sequence[int]) -> "Features":
        """The features of some rows."""
        places = list(rows)
        return Features(self.hidden[places], None if self.pooled is None else self.pooled[places])


class _Stored(nn.Module):
    """Replaces the encoder below a head and returns stored features."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        states = self.features.hidden.flatten(0, 1)[:, None]
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.features.pooled)


def read_steps(text: str) -> list[str]:
    """``"heads,scales"`` as steps in the order in which they are done; raises UnknownNameError."""
    named = [word.strip() for word in text.split(",") if word.strip()]
    for step in named:
        if step not in STEPS:
            raise unknown("calibration", step, list(STEPS))
    return [step for step in STEPS if step in named]


def check_enough(rows: Rows) -> None:
    """Raise DataError if there are too few rows for cross-validation."""
    if len(rows) < _FEWEST:
        raise DataError(rows.where, f"{len(rows)} rows", f"at least {_FEWEST}", "give more rows")


def calibrate_heads(
    model: Merged,
    encoder: Encoder,
    rows: Mapping[str, Rows],
    strengths: Sequence[float] = STRENGTHS,
    show: bool = False,
    held: Mapping[str, int | None] | None = None,
) -> Merged:
    """``model`` with every task's head refitted on the labelled ``rows``, unless the old head is as good.

    Cross-validation chooses between the ``strengths`` and the old head (:func:`choose`). The old head is kept unless
    the gain exceeds its standard error in nested cross-validation too, where the score of each fold is that of the
    candidate chosen on the other folds (:func:`judged`, the recorded score). The chosen head is then fitted on all
    rows. The pooler between the layers and the head is not changed. ``held`` is how many of each task's rows its
    adapter's training held out, for the trace. Raises DataError for too few rows.
    """
    for labelled in rows.values():
        check_enough(labelled)
    shared = fold(encoder, model.shared)
    specific, refitted = dict(model.own), {}
    with progress_bar("calibrate heads", len(model.tasks), show) as bar:
        for number, task in enumerate(model.tasks):
            kept, labelled = model.own[task.name], rows[task.name]
            tree = fold(shared, kept)
            head = _head(tree, dataclasses.replace(model.part(task.name), head=kept.head), labelled)
            ordered = sorted(strengths, reverse=True)
            figures = _cross_validated(tree, task, head, labelled, ordered)
            after = judged(figures)
            best = choose(figures) if choose([figures[0], after]) else 0
            if best:
                tensors = refit(task, head, _labels(task, labelled), ordered[best - 1])
                specific[task.name] = dataclasses.replace(kept, head=tensors)
            refitted[task.name] = {
                **labelled.record(),
                "held_out_in_training": (held or {}).get(task.name),
                "folds": FOLDS,
                "before": statistics.fmean(figures[0]),
                "after": statistics.fmean(after if best else figures[0]),
                "strength": ordered[best - 1] if best else None,
            }
            bar(number + 1, task.name)
    return _noted(model, "heads", {"rows": refitted}, own=specific)


def choose(figures: Sequence[Sequence[float]]) -> int:
    """The index of the candidate to use, by the scores in every fold; candidates start with the most conservative.

    It is the first whose mean is at most one standard error of the paired differences below the best
    (the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees).
    """
    best = max(figures, key=statistics.fmean)

    def falls_behind(scores: Sequence[float]) -> bool:
        behind = [high - low for high, low in zip(best, scores, strict=True)]
        return statistics.fmean(behind) > statistics.stdev(behind) / math.sqrt(len(behind))

    return next(place for place, scores in enumerate(figures) if not falls_behind(scores))


def judged(figures: Sequence[Sequence[float]]) -> list[float]:
    """The scores of nested cross-validation: in every fold, of the candidate chosen on the other folds.

    The score of the chosen candidate itself would be biased upwards, because it was chosen by it.
    """
    folds = range(len(figures[0]))
    return [figures[choose([[scores[k] for k in folds if k != fold] for scores in figures])][fold] for fold in folds]


def _cross_validated(
    encoder: Encoder, task: Task, head: Classifier, rows: Rows, strengths: Sequence[float]
) -> list[list[float]]:
    """The scores in every fold: of the old head, then of heads refitted with each strength on the other folds."""
    features, labels, old = _stored(head).features, _labels(task, rows), dict(head.head())
    order = shuffled(len(rows), 0)
    figures: list[list[float]] = [[] for _ in range(len(strengths) + 1)]
    for start in range(FOLDS):
        apart = sorted(order[start::FOLDS])
        fitted_on = sorted(set(order) - set(apart))
        learner, judge = (
            bare_head(encoder.config, task, old, _Stored(features.take(part))).double() for part in (fitted_on, apart)
        )
        heads: list[Tensors] = [old, *(refit(task, learner, labels[fitted_on], strength) for strength in strengths)]
        truth = rows.take(apart).label_column(task)
        for scores, tensors in zip(figures, heads, strict=True):
            with torch.no_grad():
                outputs = _outputs(judge, {name: value.double() for name, value in tensors.items()})
            column = kind_of(task).predicted(task, outputs.numpy(force=True))
            scores.append(metric(task.metric).value(truth, column))
    return figures


def features_of(encoder: Encoder, tokens: Tokens, every_token: bool) -> Features:
    """The features of all rows, in order; ``every_token``: for a head that uses the mean of each sequence."""
    hidden, pooled = dict[int, Tensor](), dict[int, Tensor]()
    with torch.no_grad():
        for batch in tokens.in_order():
            output = encode(encoder.model, batch, every_token=every_token)
            read = output[0][:, 0] if every_token else _read_by_the_head(encoder, output[0], batch)[:, 0]
            hidden.update(zip(batch.index, read.view(len(batch.index), -1, read.shape[-1]), strict=True))
            if output.get("pooler_output") is not None and not every_token:
                pooled.update(zip(batch.index, output["pooler_output"], strict=True))
    rows = range(len(tokens))
    return Features(
        torch.stack([hidden[row] for row in rows]).double(),
        torch.stack([pooled[row] for row in rows]).double() if pooled else None,
    )


def _read_by_the_head(encoder: Encoder, states: Tensor, batch: Batch) -> Float[Tensor, "rows 1 width"]:
    """The first token of each row, or the mean of its tokens if the head uses that (ModernBERT's can)."""
    if getattr(encoder.config, "classifier_pooling", "cls") != "mean":
        return states[:, :1]
    return torch.stack([row[:length].mean(0, keepdim=True) for row, length in zip(states, batch.lengths, strict=True)])


def _head(encoder: Encoder, part: Part, rows: Rows) -> Classifier:
    """The head over the features of ``rows``, in float64."""
    features = features_of(encoder, part.tokens(encoder, rows), head_of(part.head).every_token)
    return bare_head(encoder.config, part.task, part.head, _Stored(features)).double()


def _stored(head: Classifier) -> _Stored:
    """What stands under a head made here."""
    stored = head.encoder
    assert isinstance(stored, _Stored)
    return stored


def _labels(task: Task, rows: Rows) -> Tensor:
    """Classes, or values on 0…1."""
    assert rows.labels is not None
    targets = kind_of(task).targets(task, rows.labels)
    return targets.double() if targets.is_floating_point() else targets


def refit(task: Task, head: Classifier, labels: Tensor, strength: float) -> dict[str, Tensor]:
    """``argmin mean loss(θ) + strength ‖θ − θ₀‖²`` by L-BFGS, from ``θ₀``, in float64; returned in float32.

    It moves ``u`` in ``θ = θ₀ + u / √strength``, so that an infinite strength gives ``θ₀``.
    """
    old = {name: parameter.detach() for name, parameter in head.head().items()}
    moves = {name: torch.zeros_like(value, requires_grad=True) for name, value in old.items()}
    labels = labels.to(next(iter(old.values())).device)
    unit = 1 / math.sqrt(strength)
    optimizer = torch.optim.LBFGS(
        moves.values(), max_iter=_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        outputs = _outputs(head, {name: old[name] + unit * move for name, move in moves.items()})
        total = kind_of(task).loss(task, outputs, labels) + sum(move.square().sum() for move in moves.values())
        total.backward()
        return total

    optimizer.step(value)
    return {name: (old[name] + unit * move.detach()).float().cpu() for name, move in moves.items()}


def _outputs(head: Classifier, tensors: Tensors) -> Float[Tensor, "rows out"]:
    """The head's outputs with other parameters."""
    hidden = _stored(head).features.hidden
    ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    values = {f"{head.head_prefix}{name}": value.to(hidden.device) for name, value in tensors.items()}
    outputs: Tensor = functional_call(head, values, (), {"input_ids": ids})
    return outputs


def calibrate_scales(
    model: Merged, experts: Sequence[MergeInput], encoder: Encoder, rows: Mapping[str, Rows]
) -> Merged:
    """``model`` with the merged Delta of each site times ``√(Σ E‖Δi xi‖² / Σ E‖Δ xi‖²)``, ``xi`` the experts' inputs.

    The experts are not weighted. Their inputs come from ``rows``, whose labels are not read, or from the Gram matrices
    in their files. A Delta for which either sum is zero is not scaled. The tasks' residuals are computed again for the
    scaled Deltas.
    """
    if {task for expert in experts for task in expert.parts} != set(model.parts):
        raise CompositionError(
            "`steps=scales`", "inputs that were not merged", "the inputs of the merge", "give them, or `keep_inputs`"
        )
    experts = [expert for expert in experts if expert.parts]  # adapters without a task have no rows
    grams = [_grams(expert, encoder, rows) for expert in experts]
    scales = {}
    for site, delta in model.deltas.items():
        wanted = sum(
            energy(expert.deltas[site], gram[site].dense())
            for expert, gram in zip(experts, grams, strict=True)
            if site in expert.deltas
        )
        merged = sum(energy(delta, gram[site].dense()) for gram in grams)
        scales[site] = math.sqrt(wanted / merged) if wanted > 0 and merged > 0 else 1.0
    deltas = {site: delta.scaled(scales[site]) for site, delta in model.deltas.items()}
    specific, private = dict(model.own), model.recipe.get("private")
    if private:
        fresh = residuals(experts, deltas, model.shifts, private)
        specific = {task: dataclasses.replace(fresh[task].read(), head=kept.head) for task, kept in specific.items()}
    return _noted(model, "scales", {"sites": scales}, deltas=deltas, own=specific)


def _grams(expert: MergeInput, encoder: Encoder, rows: Mapping[str, Rows]) -> Mapping[str, Gram]:
    """The Gram matrix of the expert's inputs at every site."""
    parts = [expert.part(task) for task in expert.parts]
    known: Mapping[str, Any] | None = expert.statistics.get("gram")
    measured: Mapping[str, Any] = known or collect("gram", encoder, parts, [rows[task] for task in expert.parts])
    return measured


def _noted(model: Merged, step: str, record: Mapping[str, Any], **changes: Any) -> Merged:
    """``model`` with changes, and with the step recorded in its trace."""
    calibrated = {**model.trace.get("calibrated", {}), step: record}
    return dataclasses.replace(model, trace={**model.trace, "calibrated": calibrated}, **changes)
