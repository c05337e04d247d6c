"""Routed modules: one frozen base, many adapters, every row through its own.

Which row is whose is an argument of the forward pass (:class:`~mergekit_bert.encoder.packing.Layout`), never state of
a module. Rows come in the order of their adapters, so that each adapter has one slice of the batch.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.delta import Delta
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import share


class RoutedLinear(nn.Module):
    """A frozen linear layer and the Deltas of many adapters beside it."""

    def __init__(self, linear: nn.Linear, deltas: Mapping[int, Delta]) -> None:
        """``deltas`` are by the adapters' numbers."""
        super().__init__()
        self.linear = linear
        self.deltas = {number: delta.to(delta.dtype, linear.weight.device) for number, delta in deltas.items()}

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``x (W + Δi)ᵀ + b`` for the rows of each adapter i."""
        out: Tensor = self.linear(x)
        flat, rows = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        for adapter, start, stop in packing.pieces(x):
            if adapter in self.deltas:
                self.deltas[adapter].add_output(flat[start:stop], rows[start:stop])
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
