"""LoRA: ``Δ = scale · B @ A`` (Hu et al. 2021, arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732).

With an orthogonal basis ``A`` is frozen rows of it and only ``B`` is trained (arXiv 2312.02432); so it is with
directions that other tasks hardly use (arXiv 2505.22934).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergekit_bert.adapters.config import AdapterConfig, LowRankOptions
from mergekit_bert.adapters.delta import LowRank
from mergekit_bert.adapters.family import Family, Peft, Sites, Size, Tensors, Weight
from mergekit_bert.adapters.linear import AdaptedLinear, adapted_linear


def shapes(config: LowRankOptions, size: Size) -> dict[str, tuple[int, ...]]:
    """``A (rank, in)`` and ``B (out, rank)``."""
    out_features, in_features = size
    return {"A": (config.rank, in_features), "B": (out_features, config.rank)}


def init(
    config: LowRankOptions, size: Size, rows: Tensor | None, weight: Weight, source: torch.Generator
) -> dict[str, Tensor]:
    """``B = 0``; ``A`` is the rows given, or uniform on ±1/√in as in the paper's code."""
    out_features, in_features = size
    bound = 1 / math.sqrt(in_features)
    drawn = torch.rand(config.rank, in_features, generator=source) * 2 * bound - bound
    return {"A": drawn if rows is None else rows, "B": torch.zeros(out_features, config.rank)}


def low_rank(tensors: Tensors, config: LowRankOptions) -> LowRank:
    """``scale · B @ A``."""
    return LowRank(config.scale * tensors["B"], tensors["A"])


class _Beside(AdaptedLinear):
    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        delta, weight = low_rank(dict(self.tensors.items()), self.config), self.linear.weight
        if not self.dropout.drops:
            return adapted_linear(x, weight, self.linear.bias, delta)
        out: Tensor = self.linear(x)
        return out + functional.linear(functional.linear(self.dropout(x), delta.A), delta.B)


PEFT = Peft(
    type="LORA",
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    options={
        "rank": "r",
        "alpha": "lora_alpha",
        "rank_stabilized": "use_rslora",
        "dropout": "lora_dropout",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    },
    biases=True,
)

RECORD = Family(
    name="lora",
    description="low-rank update of each site, scale · B @ A",
    source="arXiv 2106.09685",
    options=AdapterConfig,
    sites=Sites(
        shapes=shapes,
        init=init,
        delta=lambda tensors, config, weight: low_rank(tensors, config),
        module=_Beside,
        basis_tensor="A",
    ),
    peft=PEFT,
)
