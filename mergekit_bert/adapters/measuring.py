"""Measures statistics of the sites of a fine-tuned model on unlabelled texts."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.family import Size
from mergekit_bert.adapters.patch import Part
from mergekit_bert.adapters.statistics import Fisher, Gram, Statistic, check_kinds
from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.data.kind import kind_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import linear_layers, of_the_head

_ROWS = 16
"""Rows in one pass."""


def collect(statistic: str, encoder: Encoder, parts: Sequence[Part], rows: Sequence[Rows]) -> Mapping[str, Statistic]:
    """The ``statistic`` (``gram`` or ``fisher``) of ``parts`` by site, measured on ``rows`` of their tasks.

    All linear layers are measured, adapted or not, because a part without a site is a zero Delta there. Layers that
    only the head reads are left out, because they are never merged. Labels are not read.
    """
    check_kinds([statistic])
    sizes = {site: size for site, size in linear_layers(encoder).items() if not of_the_head(site)}
    device = next(encoder.model.parameters()).device
    ready = (_ready(encoder, part, own) for part, own in zip(parts, rows, strict=True))
    return _grams(sizes, device, ready) if statistic == "gram" else _fishers(sizes, device, ready)


def _ready(encoder: Encoder, part: Part, rows: Rows) -> tuple[Task, Classifier, Tokens]:
    """A part folded into a tree of its own, and its rows as tokens."""
    model = classifier(fold(encoder, part), part.task, part.head)
    return part.task, model, part.tokens(encoder, rows)


def _batches(model: Classifier, tokens: Tokens) -> Iterator[Batch]:
    """Batches of rows of similar length, or single rows if the architecture is padded."""
    count = _ROWS if packing.enabled(model.encoder) else 1
    order = sorted(range(len(tokens)), key=tokens.length)
    for start in range(0, len(order), count):
        yield tokens.batch(order[start : start + count])


def _grams(
    sizes: Mapping[str, Size], device: torch.device, ready: Iterator[tuple[Task, Classifier, Tokens]]
) -> dict[str, Gram]:
    """Products in float32 a batch, summed in float64."""
    sums = {site: torch.zeros(width, width, dtype=torch.float64, device=device) for site, (_, width) in sizes.items()}
    counts, seen = Counter[str](), set[str]()
    real = torch.ones(1, 1, dtype=torch.bool, device=device)

    def add(site: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if site not in seen:  # DeBERTa puts its relative positions through the same layers, after the tokens
            seen.add(site)
            states = inputs[0]
            x = states[real] if states.shape[:-1] == real.shape else states.flatten(0, -2)
            sums[site] += (x.T @ x).double()
            counts[site] += len(x)

    for _, model, tokens in ready:
        for site in sizes:
            model.encoder.get_submodule(site).register_forward_pre_hook(partial(add, site))
        for batch in _batches(model, tokens):
            seen.clear()
            real = batch.padded()["attention_mask"].bool().to(device)
            with torch.no_grad():
                outputs_of(model, batch)
    return {site: Gram.of(sums[site] / max(1, counts[site]), counts[site]) for site in sizes}


def _fishers(
    sizes: Mapping[str, Size], device: torch.device, ready: Iterator[tuple[Task, Classifier, Tokens]]
) -> dict[str, Fisher]:
    """A row's gradient is ``Σ g xᵀ`` over its tokens, with ``g`` the gradient at the site's output."""
    sums = {site: torch.zeros(size, dtype=torch.float64, device=device) for site, size in sizes.items()}
    calls: list[tuple[str, Tensor, Tensor]] = []
    count = 0

    def keep(site: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the weights are shared and stay frozen: the graph begins here
            output = output.detach().requires_grad_()
        calls.append((site, inputs[0].detach(), output))
        return output

    for task, model, tokens in ready:
        for site in sizes:
            model.encoder.get_submodule(site).register_forward_hook(partial(keep, site))
        for batch in _batches(model, tokens):
            calls.clear()
            with torch.enable_grad():
                outputs = outputs_of(model, batch)
            for direction in kind_of(task).directions(task, outputs.detach()):
                score, made = (direction * outputs).sum(), [output for *_, output in calls]
                gradients = torch.autograd.grad(score, made, retain_graph=True, allow_unused=True)
                pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
                for (site, x, _), g in zip(calls, gradients, strict=True):
                    if g is not None:
                        pairs[site].append((x, g))
                for site, own in pairs.items():
                    sums[site] += _squared(own, batch.row_lengths).double()
            count += len(batch.index)
    return {site: Fisher.of(total / count, count) for site, total in sums.items()}


def _squared(pairs: Sequence[tuple[Tensor, Tensor]], lengths: tuple[int, ...]) -> Float[Tensor, "out in"]:
    """``Σ (Σ g xᵀ)²``, the inner sum over a row's tokens, the outer one over rows; ``pairs`` are each call's (x, g)."""
    split = [(_by_row(x, lengths), _by_row(g, lengths)) for x, g in pairs]
    total = torch.zeros(())
    for row in range(len(lengths)):
        gradient = sum((g[row].T @ x[row] for x, g in split), start=torch.zeros(()))
        total = total + gradient.square()
    return total


def _by_row(x: Float[Tensor, "... width"], lengths: tuple[int, ...]) -> Sequence[Float[Tensor, "_ width"]]:
    """Each row's vectors: one a token, or equally many a row (first tokens; positions, where the row is alone)."""
    flat = x.flatten(0, -2)
    each = len(flat) // len(lengths)
    return torch.split(flat, list(lengths) if len(flat) == sum(lengths) else each)
