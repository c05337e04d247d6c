"""Linear layers with an adapter in training beside them.

:func:`adapted_linear` is ``x Wᵀ + b + (x Aᵀ) Bᵀ`` with the gradients that training needs and no more: the thin products
are added into the wide ones' results in place, and what is kept for the backward pass is ``x`` and ``x Aᵀ`` (Hu et al.
2021, arXiv 2106.09685, section 4.2: nothing of the size of ``W`` is ever made).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mergekit_bert.adapters.delta import LowRank


class SeededDropout(nn.Module):
    """Dropout from a generator of its own, so that runs repeat and threads do not disturb each other."""

    def __init__(self, p: float, source: torch.Generator) -> None:
        """Drop each entry with probability ``p``, once switched on by training mode."""
        super().__init__()
        self.eval()
        self.p, self.source = p, source

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.training and self.p > 0

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``x`` with entries dropped and the rest scaled by 1/(1−p), while training."""
        if not self.drops:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.source)
        return x * keep / (1 - self.p)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and an adapter beside it: a family's module is one, with a ``forward`` of its own.

    ``forward`` gives ``x (W + Δ)ᵀ + b``, differentiable in ``tensors``; with dropout the Delta alone sees dropped
    entries.
    """

    def __init__(
        self,
        linear: nn.Linear,
        tensors: Mapping[str, Tensor],
        frozen: frozenset[str],
        config: Any,
        source: torch.Generator,
    ) -> None:
        """``tensors`` are the family's; those in ``frozen`` are not trained. ``linear`` is still in float32.

        ``config`` is the family's record of options, as it holds at this site.
        """
        super().__init__()
        self.linear, self.config = linear, config
        self.tensors = nn.ParameterDict(
            {
                name: nn.Parameter(tensor.to(linear.weight.device, copy=True), requires_grad=name not in frozen)
                for name, tensor in tensors.items()
            }
        )
        self.dropout = SeededDropout(config.dropout, source)


def adapted_linear(
    x: Float[Tensor, "... in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None, delta: LowRank
) -> Float[Tensor, "... out"]:
    """``x (W + B A)ᵀ + b`` in the dtype of ``W``, which is frozen."""
    with torch.autocast(x.device.type, enabled=False):  # it casts by itself, once
        out: Tensor = _AdaptedLinear.apply(x, weight, bias, delta.A, delta.B)  # type: ignore[no-untyped-call]
    return out


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "... in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        a: Float[Tensor, "r in"],
        b: Float[Tensor, "out r"],
    ) -> Float[Tensor, "... out"]:
        given, dtype = (x, weight, bias, a, b), weight.dtype
        rows, a, b = x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype), b.to(dtype)
        thin = rows @ a.T
        out = rows @ weight.T if bias is None else torch.addmm(bias.to(dtype), rows, weight.T)
        out.addmm_(thin, b.T)
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, thin, weight, a, b)
        ctx.dtypes = tuple(tensor.dtype if tensor is not None else None for tensor in given)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, thin, weight, a, b = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        out = gradients[0].reshape(-1, weight.shape[0])
        by_x = by_bias = by_a = by_b = None
        by_thin = out @ b if needs_x or needs_a else None
        if needs_x:
            by_x = (out @ weight).addmm_(by_thin, a)
            by_x = by_x.view(*gradients[0].shape[:-1], weight.shape[1]).to(ctx.dtypes[0])
        if needs_bias:
            by_bias = out.sum(0, dtype=ctx.dtypes[2])
        if needs_a:
            assert by_thin is not None
            by_a = (by_thin.T @ rows).to(ctx.dtypes[3])
        if needs_b:
            by_b = (out.T @ thin).to(ctx.dtypes[4])
        return by_x, None, by_bias, by_a, by_b
