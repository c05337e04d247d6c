"""Calibration: what a merge moved is put right on rows of each task, after the merge and by a name of its own.

``heads``: every task's head is fitted anew to the merged model's features, on labelled rows. ``scales``: at every site
the merged Delta is scaled so that it moves outputs as far as the experts' own Deltas did, on rows without labels.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mergekit_bert.adapters.adapter import Tensors
from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.adapters.measuring import collect
from mergekit_bert.adapters.statistics import Gram
from mergekit_bert.composing.composition import Merged
from mergekit_bert.composing.ingredient import Ingredient
from mergekit_bert.composing.private import remainders
from mergekit_bert.data.batches import Batch, Tokens, tokenise
from mergekit_bert.data.metrics import metric, predicted_column
from mergekit_bert.data.rows import Rows, hold_out
from mergekit_bert.data.task import Task
from mergekit_bert.encoder.forward import encode
from mergekit_bert.encoder.heads import Classifier, bare_head
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError
from mergekit_bert.progress import progress_bar
from mergekit_bert.registry import unknown

STEPS = ("scales", "heads")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""How strongly a head is drawn to the one it was: the factor of ``‖θ − θ₀‖²`` beside the mean loss."""
_HELD_OUT = 0.3
_ITERATIONS = 100


@dataclass(frozen=True)
class Features:
    """What an encoder gives a head, in float64.

    Of each row the first token (the mean, where the head takes that), and what a pooler in the encoder made of it.
    """

    hidden: Float[Tensor, "rows 1 width"]
    pooled: Float[Tensor, "rows width"] | None


class _Stored(nn.Module):
    """Stands in for the encoder under a head: it gives features that were computed before."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=self.features.hidden, pooler_output=self.features.pooled)


@dataclass(frozen=True)
class Fitted:
    """A head, its main figure on the rows held out, and how strongly it was drawn to the old one (None: it is that)."""

    head: Tensors
    figure: float
    loss: float
    strength: float | None


def read_steps(text: str) -> list[str]:
    """``"heads,scales"`` as steps in the order in which they are taken; raises UnknownNameError."""
    named = [word.strip() for word in text.split(",") if word.strip()]
    for step in named:
        if step not in STEPS:
            raise unknown("calibration", step, list(STEPS))
    return [step for step in STEPS if step in named]


def calibrate_heads(
    model: Merged,
    encoder: Encoder,
    rows: Mapping[str, Rows],
    strengths: Sequence[float] = STRENGTHS,
    show: bool = False,
) -> Merged:
    """``model`` with every task's head refitted on the labelled ``rows``, or the old one where that is as good.

    Three in ten of a task's rows are held out from the fit and choose between the ``strengths`` and the old head. What
    lies between the layers and the head (BERT's pooler) stays. Raises DataError for too few rows.
    """
    shared = fold(encoder, model.deltas, model.shifts)
    own, told = dict(model.own), {}
    with progress_bar("calibrate heads", len(model.tasks), show) as bar:
        for number, task in enumerate(model.tasks):
            kept = model.own[task.name]
            tree = fold(shared, kept.deltas, kept.shifts)
            parts = hold_out(rows[task.name], _HELD_OUT, len(rows[task.name]), 0)
            length = model.part(task.name).max_length
            heads = [_head(tree, task, kept.head, part, length) for part in parts]
            labels = [_labels(task, part) for part in parts]
            old, *new = [_fit(task, heads, labels, parts[1], kept.head, strength) for strength in (None, *strengths)]
            best = max(new, key=lambda one: (one.figure, -one.loss), default=old)
            chosen = best if (best.figure, -best.loss) > (old.figure, -old.loss) else old
            own[task.name] = dataclasses.replace(kept, head=chosen.head)
            told[task.name] = {
                "fingerprint": rows[task.name].fingerprint(),
                "count": len(rows[task.name]),
                "held_out": len(parts[1]),
                "before": old.figure,
                "after": chosen.figure,
                "strength": chosen.strength,
            }
            bar(number + 1, task.name)
    return _noted(model, "heads", {"rows": told}, own=own)


def features_of(encoder: Encoder, tokens: Tokens) -> Features:
    """The features of all rows, in their order."""
    hidden, pooled = dict[int, Tensor](), dict[int, Tensor]()
    with torch.no_grad():
        for batch in tokens.in_order():
            output = encode(encoder.model, batch, ())
            hidden.update(zip(batch.index, _read_by_the_head(encoder, output[0], batch), strict=True))
            if output.get("pooler_output") is not None:
                pooled.update(zip(batch.index, output["pooler_output"], strict=True))
    rows = range(len(tokens))
    return Features(
        torch.stack([hidden[row] for row in rows]).double(),
        torch.stack([pooled[row] for row in rows]).double() if pooled else None,
    )


def _read_by_the_head(encoder: Encoder, states: Tensor, batch: Batch) -> Float[Tensor, "rows 1 width"]:
    """The first token of each row; the mean of all where the head takes that (ModernBERT's may)."""
    if getattr(encoder.config, "classifier_pooling", "cls") != "mean":
        return states[:, :1]
    return torch.stack([row[:length].mean(0, keepdim=True) for row, length in zip(states, batch.lengths, strict=True)])


def _head(encoder: Encoder, task: Task, head: Tensors, rows: Rows, max_length: int) -> Classifier:
    """The head over the features of ``rows``, in float64."""
    tokens = tokenise(dataclasses.replace(rows, labels=None), task, encoder.tokenizer, max_length, encoder.pad_token)
    return bare_head(encoder, task, head, _Stored(features_of(encoder, tokens))).double()


def _labels(task: Task, rows: Rows) -> Tensor:
    """Classes, or values on 0…1."""
    labels = torch.from_numpy(rows.label_column())
    if task.range is None:
        return labels.long()
    low, high = task.range
    return (labels - low) / (high - low)


def _fit(
    task: Task,
    heads: Sequence[Classifier],
    labels: Sequence[Tensor],
    held: Rows,
    start: Tensors,
    strength: float | None,
) -> Fitted:
    """A head fitted on the first of ``heads`` and measured on the second; None for ``strength`` leaves it as it is."""
    head = start if strength is None else refit(task, heads[0], labels[0], strength)
    with torch.no_grad():
        outputs = _outputs(heads[1], {name: value.double() for name, value in head.items()})
        loss = float(_loss(task, outputs, labels[1].to(outputs.device)))
    column = predicted_column(task.kind, outputs.numpy(force=True))
    return Fitted(head, metric(task.metric).value(held.label_column(), column), loss, strength)


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
        total = _loss(task, outputs, labels) + sum(move.square().sum() for move in moves.values())
        total.backward()
        return total

    optimizer.step(value)
    return {name: (old[name] + unit * move.detach()).float().cpu() for name, move in moves.items()}


def _outputs(head: Classifier, tensors: Tensors) -> Float[Tensor, "rows out"]:
    """What the head gives with other tensors."""
    stored = head.encoder
    assert isinstance(stored, _Stored)
    hidden = stored.features.hidden
    ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    values = {f"shell.{name}": value.to(hidden.device) for name, value in tensors.items()}
    outputs: Tensor = functional_call(head, values, (), {"input_ids": ids})
    return outputs


def _loss(task: Task, outputs: Float[Tensor, "rows out"], labels: Tensor) -> Float[Tensor, ""]:
    """The loss of training."""
    if task.range is None:
        return functional.cross_entropy(outputs, labels)
    return functional.mse_loss(outputs[:, 0], labels)


def calibrate_scales(
    model: Merged, experts: Sequence[Ingredient], encoder: Encoder, rows: Mapping[str, Rows]
) -> Merged:
    """``model`` with the merged Delta of each site times ``√(Σ E‖Δi xi‖² / Σ E‖Δ xi‖²)``, ``xi`` the experts' inputs.

    The experts count as they are, whatever they weighed. Their inputs come from ``rows``, whose labels are not read, or
    from the Gram matrices in their files. Where nothing can be scaled a Delta stays as it is. Remainders that the merge
    kept for its tasks are taken anew, beside the scaled Deltas.
    """
    if {task for one in experts for task in one.parts} != set(model.parts):
        raise CompositionError(
            "--calibrate scales", "other inputs than those of the merge", "its inputs", "give them, or --keep-inputs"
        )
    grams = [_grams(one, encoder, rows) for one in experts]
    scales = {}
    for site, delta in model.deltas.items():
        wanted = sum(
            _energy(one.deltas[site], own[site]) for one, own in zip(experts, grams, strict=True) if site in one.deltas
        )
        found = sum(_energy(delta, own[site]) for own in grams)
        scales[site] = math.sqrt(wanted / found) if wanted > 0 and found > 0 else 1.0
    deltas = {site: delta.scaled(scales[site]) for site, delta in model.deltas.items()}
    own, private = dict(model.own), model.recipe.get("private")
    if private:
        fresh = remainders(experts, deltas, model.shifts, private)
        own = {task: dataclasses.replace(fresh[task].read(), head=kept.head) for task, kept in own.items()}
    return _noted(model, "scales", {"sites": scales}, deltas=deltas, own=own)


def _grams(one: Ingredient, encoder: Encoder, rows: Mapping[str, Rows]) -> Mapping[str, Gram]:
    """The Gram matrix of what the expert sees at every site."""
    known: Mapping[str, Any] | None = one.statistics.get("gram")
    parts = [one.model.part(task) for task in one.parts]
    return known or collect("gram", encoder, parts, [rows[task] for task in one.parts])  # type: ignore[return-value]


def _energy(delta: Delta, gram: Gram) -> float:
    """``E‖Δ x‖² = tr(Δ G Δᵀ)``."""
    if isinstance(delta, LowRank):
        left, right = delta.B.double(), delta.A.double()
        return float(((left.T @ left) * (right @ gram.dense() @ right.T)).sum())
    matrix = delta.matrix.double()
    return float((matrix @ gram.dense() * matrix).sum())


def _noted(model: Merged, step: str, told: Mapping[str, Any], **changes: Any) -> Merged:
    """``model`` with changes, and what is told of the step in its trace."""
    calibrated = {**model.trace.get("calibrated", {}), step: told}
    return dataclasses.replace(model, trace={**model.trace, "calibrated": calibrated}, **changes)
