"""DoRA: ``W' = m · (W + scale · B @ A) / ‖W + scale · B @ A‖``, by output row (Liu et al. 2024, arXiv 2402.09353).

A site's weight is taken apart into a direction, which gets a LoRA, and the magnitude ``m`` of each output row, which is
trained. As in PEFT the norm counts as a constant in the backward pass (section 4.3 of the paper). The Delta holds a
part of ``W``: it is dense, it needs ``W``, and no choice of ``A`` makes it orthogonal to another one, so ``A`` is
trained.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.config import LowRankOptions
from mergekit_bert.adapters.delta import Dense
from mergekit_bert.adapters.families import lora
from mergekit_bert.adapters.family import Family, Sites, Size, Tensors, Weight
from mergekit_bert.adapters.linear import AdaptedLinear, adapted_linear


def _shapes(config: LowRankOptions, size: Size) -> dict[str, tuple[int, ...]]:
    return {**lora.shapes(config, size), "m": (size[0],)}


def _init(
    config: LowRankOptions, size: Size, rows: Tensor | None, weight: Weight, source: torch.Generator
) -> dict[str, Tensor]:
    """LoRA's start, and the norms of ``W``: nothing is changed at first."""
    return {**lora.init(config, size, rows, weight, source), "m": torch.linalg.vector_norm(weight(), dim=1)}


def _delta(tensors: Tensors, config: LowRankOptions, weight: Weight) -> Dense:
    """``m · (W + scale · B @ A) / ‖…‖ − W``, worked out in float64; rows of zeros stay zeros."""
    W = weight().double()
    turned = W + lora.low_rank(tensors, config).to(torch.float64).dense()
    length = torch.linalg.vector_norm(turned.detach(), dim=1, keepdim=True).clamp(min=_TINY)
    delta: Tensor = tensors["m"].double()[:, None] * turned / length - W
    return Dense(delta.to(tensors["m"].dtype))


_TINY = torch.finfo(torch.float64).tiny


class _Beside(AdaptedLinear):
    """``g · x (W + scale · B @ A)ᵀ + b`` with ``g = m / ‖W + scale · B @ A‖``; the matrix in the norm is never made."""

    squares: Float[Tensor, "out"]

    def __init__(
        self,
        linear: nn.Linear,
        tensors: Tensors,
        frozen: frozenset[str],
        config: LowRankOptions,
        source: torch.Generator,
    ) -> None:
        super().__init__(linear, tensors, frozen, config, source)
        self.register_buffer("squares", linear.weight.detach().float().square().sum(1), persistent=False)

    def _gain(self) -> Float[Tensor, "out"]:
        """``g``, by ``‖W + B A‖² = ‖W‖² + 2 ⟨B, W Aᵀ⟩ + ⟨B, B A Aᵀ⟩`` of every row; in float32."""
        low = lora.low_rank({name: tensor.detach() for name, tensor in self.tensors.items()}, self.config)
        weight = self.linear.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            across = (weight @ low.A.T.to(weight.dtype)).float()
            length = (self.squares + (low.B * (2 * across + low.B @ (low.A @ low.A.T))).sum(1)).clamp(min=0).sqrt()
        gain: Tensor = self.tensors["m"] / length.clamp(min=torch.finfo(length.dtype).tiny)
        return gain

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """In the dtype of ``W``; ``g`` and its gradient stay in float32."""
        low, gain = lora.low_rank(dict(self.tensors.items()), self.config), self._gain()
        weight, bias = self.linear.weight, self.linear.bias
        if not self.dropout.drops:
            turned = adapted_linear(x, weight, None, low)
            out = gain * turned
            return (out if bias is None else out + bias).to(turned.dtype)
        dropped = self.dropout(x)
        update = functional.linear(functional.linear(dropped, low.A), low.B)
        turned = functional.linear(dropped, weight) + update
        beside: Tensor = self.linear(x) + update + (gain - 1) * turned
        return beside.to(turned.dtype)


RECORD = Family(
    name="dora",
    description="direction and magnitude of each site's weight, m · (W + scale · B @ A) / ‖W + scale · B @ A‖",
    source="arXiv 2402.09353",
    options=LowRankOptions,
    sites=Sites(shapes=_shapes, init=_init, delta=_delta, module=_Beside, needs_weight=True),
    peft=replace(
        lora.PEFT, tensors={**lora.PEFT.tensors, "m": "lora_magnitude_vector"}, switches=frozenset({"use_dora"})
    ),
)
