"""Routed modules: one frozen base, many adapters, every row through its own.

Which row is whose is an argument of the forward pass (:class:`~mergekit_bert.encoder.packing.Layout`), never state of
a module. Rows come in the order of their adapters, so that each adapter has one slice of the batch.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.heads import share

_BATCHED, _PADDED = 6, 3
"""From so many adapters of one rank on, their thin products are done as one batched product, unless padding it to the
largest would make it so many times as large."""


def _add(
    out: Float[Tensor, "n out"],
    x: Float[Tensor, "n in"],
    deltas: Mapping[int, LowRank],
    pieces: Sequence[packing.Piece],
) -> None:
    """Add ``(x Aᵀ) Bᵀ`` to each piece of ``out`` that one of ``deltas`` (of one rank) is for, in place."""
    own = [piece for piece in pieces if piece.adapter in deltas]
    sizes = [piece.stop - piece.start for piece in own]
    if len(own) < _BATCHED or max(sizes) * len(own) > _PADDED * sum(sizes):
        for adapter, start, stop in own:
            out[start:stop].addmm_(x[start:stop] @ deltas[adapter].A.T, deltas[adapter].B.T)
        return
    counts = torch.tensor(sizes, device=x.device)
    starts = torch.tensor([piece.start for piece in own], device=x.device)
    step = torch.arange(int(counts.max()), device=x.device)
    real = step < counts[:, None]
    slots = starts[:, None] + torch.where(real, step, 0)
    thin = torch.bmm(x[slots], torch.stack([deltas[piece.adapter].A for piece in own]).mT)
    wide = torch.bmm(thin, torch.stack([deltas[piece.adapter].B for piece in own]).mT)
    out.index_add_(0, slots[real], wide[real])


class RoutedLinear(nn.Module):
    """A frozen linear layer and the Deltas of many adapters beside it."""

    def __init__(self, linear: nn.Linear, deltas: Mapping[int, Delta]) -> None:
        """``deltas`` are by the adapters' numbers."""
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        low = {
            number: LowRank(delta.B.to(device), delta.A.to(device))
            for number, delta in deltas.items()
            if isinstance(delta, LowRank)
        }
        ranks = sorted({delta.rank for delta in low.values()})
        self.low = [{number: delta for number, delta in low.items() if delta.rank == rank} for rank in ranks]
        self.dense = {number: delta.dense().to(device) for number, delta in deltas.items() if number not in low}

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``x (W + Δi)ᵀ + b`` for the rows of each adapter i."""
        out: Tensor = self.linear(x)
        flat, rows, pieces = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), packing.pieces(x)
        for deltas in self.low:
            _add(flat, rows, deltas, pieces)
        for adapter, start, stop in pieces:
            if adapter in self.dense:
                flat[start:stop].addmm_(rows[start:stop], self.dense[adapter].T)
        return out


class RoutedModule(nn.Module):
    """A frozen module (a norm, a linear layer) of which some adapters change parameters by themselves."""

    def __init__(self, module: nn.Module, shifts: Mapping[int, Mapping[str, Tensor]]) -> None:
        """``shifts`` are changes of the module's parameters, by the adapters' numbers and the parameters' names."""
        super().__init__()
        self.module, self.changed = module, nn.ModuleDict()
        for adapter, changes in shifts.items():
            copy = share(module)
            for name, change in changes.items():
                value = module.get_parameter(name)
                setattr(copy, name, nn.Parameter(value + change.to(value.device), requires_grad=False))
            self.changed[str(adapter)] = copy

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Each adapter's rows by its own module."""
        out: Tensor = self.module(x)
        flat, rows = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        for adapter, start, stop in packing.pieces(x):
            if str(adapter) in self.changed:
                flat[start:stop] = self.changed[str(adapter)](rows[start:stop])
        return out
