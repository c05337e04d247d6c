"""Sites of plain matrices, on which the entrywise methods are tried by hand and against brute force."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mergekit_bert.adapters.delta import Delta, Dense, LowRank
from mergekit_bert.composing.method import METHODS, Site, make_options
from mergekit_bert.hardware import generator

NAMES = ("sst", "sts", "para", "nli")
SMALL = st.integers(-3, 3).map(float)
"""Entries that are often equal, often zero, and exact in any sum."""


def site(
    method: str,
    matrices: Sequence[Any],
    weights: Sequence[float] | None = None,
    name: str = "layer",
    seed: int = 0,
    **options: Any,
) -> Site:
    """A site of Deltas that are given as such, or as rows of numbers."""
    deltas = [one if isinstance(one, Dense | LowRank) else Dense(torch.as_tensor(one).float()) for one in matrices]
    return Site(
        name=name,
        names=NAMES[: len(deltas)],
        deltas=deltas,
        weights=weights or [1.0] * len(deltas),
        options=make_options(METHODS.get(method), options),
        seed=seed,
    )


def merge(method: str, *arguments: Any, **options: Any) -> Tensor:
    """The merged matrix of one site, surveyed where the method wants that."""
    return merge_all(method, [site(method, *arguments, **options)])[0]


def merge_all(method: str, sites: Sequence[Site]) -> list[Tensor]:
    """The merged matrices of sites that are surveyed together."""
    record = METHODS.get(method)
    survey = record.survey(sites) if record.survey is not None else None
    found: list[Delta] = [record.merge(dataclasses.replace(one, survey=survey)) for one in sites]
    return [delta.dense() for delta in found]


def noise(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Random matrices without equal entries."""
    source = generator(seed, 7)
    return [torch.randn(shape, generator=source) for _ in range(count)]


def ranked(values: Sequence[float]) -> list[int]:
    """The places of ``values`` from the largest magnitude to the smallest, the first of equal ones first."""
    return sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
