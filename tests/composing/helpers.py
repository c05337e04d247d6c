"""Adapters to compose, and their sums by brute force."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import mergekit_bert as mb
from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.composing.merging import MergeContext
from mergekit_bert.composing.merging import merge as compose
from mergekit_bert.composing.method import METHODS
from mergekit_bert.composing.recipe import Recipe
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import get_task
from tests.adapters.helpers import dense64, random_adapter
from tests.tiny import tiny_rows

ONE = "encoder.layer.0.attention.output.dense"
"""A square site of the tiny BERT."""
LINEAR = [method.name for method in METHODS if method.linear and method.learn is None]


def trio(encoder: mb.Encoder, **options: object) -> list[Adapter]:
    """Adapters of three tasks with 5, 1 and 2 outputs, on disjoint rows of one basis."""
    return [
        random_adapter(encoder, task, seed=place, start=3 * place, examples=count, **options)  # type: ignore[arg-type]
        for place, (task, count) in enumerate((("sst", 100), ("sts", 300), ("para", 600)))
    ]


def merge(
    adapters: Sequence[Adapter], method: str, weights: Mapping[str, float] | None = None, **options: Any
) -> mb.Merged | mb.Ensemble:
    """A composition by ``method``; other options are those of a recipe, and ``given``."""
    given = options.pop("given", None)
    return compose(adapters, Recipe(method, weights=weights or {}, **options), given)


def merged(
    adapters: Sequence[Adapter], method: str, weights: Mapping[str, float] | None = None, **options: Any
) -> mb.Merged:
    """The merged model, by a method that merges."""
    model = merge(adapters, method, weights, **options)
    assert isinstance(model, mb.Merged)
    return model


def given(encoder: mb.Encoder, count: int = 6) -> MergeContext:
    """An encoder, and a few rows for methods that need some."""

    def rows(task: str) -> Rows:
        return dataclasses.replace(tiny_rows(get_task(task), count), labels=None)

    return MergeContext(lambda: encoder, rows)


def brute_force(adapters: Sequence[Adapter], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """``Σ λi Δi`` of every site of the layers, dense and in float64."""
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for site, delta in dense64(adapter).items():
            if site.startswith("pooler"):
                continue
            total[site] = total.get(site, torch.zeros_like(delta)) + weights[adapter.name] * delta
    return total


def zeroed(adapter: Adapter) -> Adapter:
    """The same adapter with a Delta of zero, as before its training."""
    tensors = {site: {**one, "B": torch.zeros_like(one["B"])} for site, one in adapter.tensors.items()}
    shifts = {name: torch.zeros_like(value) for name, value in adapter.shifts.items()}
    return dataclasses.replace(adapter, tensors=tensors, shifts=shifts)
