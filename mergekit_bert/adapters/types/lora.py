"""LoRA: ``Δ = scale · B @ A`` (Hu et al. 2021, arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732).

With an orthogonal basis ``A`` is frozen rows of it and only ``B`` is trained (arXiv 2312.02432); so it is with
directions that other tasks hardly use (arXiv 2505.22934).
"""

import math

import torch
from torch import Tensor

from mergekit_bert.adapters.adapter import AdapterType, Size, Tensors
from mergekit_bert.adapters.config import AdapterConfig
from mergekit_bert.adapters.delta import LowRank


def _shapes(config: AdapterConfig, size: Size) -> dict[str, tuple[int, ...]]:
    out_features, in_features = size
    return {"A": (config.rank, in_features), "B": (out_features, config.rank)}


def _init(config: AdapterConfig, size: Size, rows: Tensor | None, source: torch.Generator) -> dict[str, Tensor]:
    """``B = 0``; ``A`` is the rows given, or uniform on ±1/√in as in the paper's code."""
    out_features, in_features = size
    bound = 1 / math.sqrt(in_features)
    drawn = torch.rand(config.rank, in_features, generator=source) * 2 * bound - bound
    return {"A": drawn if rows is None else rows, "B": torch.zeros(out_features, config.rank)}


def _delta(tensors: Tensors, config: AdapterConfig) -> LowRank:
    return LowRank(config.scale * tensors["B"], tensors["A"])


RECORD = AdapterType(
    name="lora",
    description="low-rank update of each site, scale · B @ A",
    source="arXiv 2106.09685",
    shapes=_shapes,
    init=_init,
    delta=_delta,
)
