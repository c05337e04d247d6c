"""LoHa: ``Δ = scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b)``, entry by entry (Hyeon-Woo et al. 2022, arXiv 2108.06098).

The product of two matrices of rank ``r`` has a rank of up to ``r²`` from ``2 r (out + in)`` numbers, and it has factors
of that rank: the products of every column of ``w1_a`` with every one of ``w2_a``, and likewise of the rows (Slyusar
1999; Khatri & Rao 1968). So the Delta is low-rank wherever these are smaller than the matrix. The start is PEFT's and
LyCORIS' (arXiv 2309.14859): ``w2_b`` is zero, the others uniform.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergekit_bert.adapters.config import LowRankOptions
from mergekit_bert.adapters.delta import Delta, Dense, LowRank, factors
from mergekit_bert.adapters.family import Family, Peft, Sites, Size, Tensors, Weight
from mergekit_bert.adapters.linear import AdaptedLinear, adapted_linear

_TENSORS = ("w1_a", "w1_b", "w2_a", "w2_b")


def _shapes(config: LowRankOptions, size: Size) -> dict[str, tuple[int, ...]]:
    out_features, in_features = size
    return {name: (out_features, config.rank) if name[-1] == "a" else (config.rank, in_features) for name in _TENSORS}


def _init(
    config: LowRankOptions, size: Size, rows: Tensor | None, weight: Weight, source: torch.Generator
) -> dict[str, Tensor]:
    """``w2_b = 0``; the others uniform on ±1/√columns."""
    values = {
        name: (torch.rand(shape, generator=source) * 2 - 1) / math.sqrt(shape[1])
        for name, shape in _shapes(config, size).items()
    }
    return {**values, "w2_b": torch.zeros_like(values["w2_b"])}


def _delta(tensors: Tensors, config: LowRankOptions) -> Delta:
    """Of rank ``r²`` in factors where they are smaller than the matrix, else dense."""
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in _TENSORS)
    (rank, inner), out = w1_b.shape, len(w1_a)
    if rank * rank * (out + inner) >= out * inner:
        return Dense(config.scale * (w1_a @ w1_b) * (w2_a @ w2_b))
    left = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    right = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return LowRank(config.scale * left, right)


class _Beside(AdaptedLinear):
    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        delta = _delta(dict(self.tensors.items()), self.config)
        if delta.rank is not None and not self.dropout.drops:
            return adapted_linear(x, self.linear.weight, self.linear.bias, factors(delta))
        out: Tensor = self.linear(x)
        return out + functional.linear(self.dropout(x), delta.dense())


RECORD = Family(
    name="loha",
    description="update of each site by the entrywise product of two low-rank matrices",
    source="arXiv 2108.06098",
    options=LowRankOptions,
    sites=Sites(
        shapes=_shapes, init=_init, delta=lambda tensors, config, weight: _delta(tensors, config), module=_Beside
    ),
    peft=Peft(
        type="LOHA",
        tensors={name: f"hada_{name}" for name in _TENSORS},
        options={"rank": "r", "alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"},
        lacks=("rank_stabilized",),
    ),
)
