"""What the methods share that look at every entry of the Deltas by itself: trimming, dropping, electing signs.

Trimming and dropping see the Deltas as they were trained, electing and adding see them weighted: so a weight scales
the result and decides nothing else, but for the sign it gives to its adapter's vote.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROUNDING = 1e-5
"""Beside an adapter's largest entry, less than this share of it may be a zero: in the coordinates of a space most zeros
are rounding of float32 factors, and more of it the closer their singular values lie."""


def portion(share: float, count: int) -> Fraction:
    """``share · count`` of the decimal number that was written: 0.29 of 100 is 29, not 28.999…"""
    return Fraction(repr(share)) * count


def largest(values: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """Where the ``count`` largest magnitudes lie, no more and no fewer: of equal ones the first are taken."""
    sizes = values.abs().flatten()
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    if count > 0:
        place = sizes.numel() - count
        bar = float(np.partition(sizes.numpy(), place)[place])  # less than half the time of torch's kthvalue
        kept = sizes > bar
        kept[(sizes == bar).nonzero()[: count - int(kept.sum())]] = True
    return kept.reshape(values.shape)


def dropped(
    values: Float[Tensor, "out in"], chance: Float[Tensor, "out in"] | float, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Each entry is zero with its ``chance`` and divided by ``1 − chance`` otherwise, which keeps the mean (DARE)."""
    stays = torch.rand(values.shape, generator=generator, dtype=torch.float64) >= chance
    return torch.where(stays, values / (1 - chance), 0).to(values.dtype)


def trimmed(values: Float[Tensor, "out in"], count: int) -> Float[Tensor, "out in"]:
    """The ``count`` largest entries, zero elsewhere."""
    return torch.where(largest(values, count), values, 0)


def weighted(values: Sequence[Float[Tensor, "out in"]], weights: Sequence[float]) -> Float[Tensor, "adapters out in"]:
    """``λi`` times each, stacked."""
    return torch.stack([weight * one for one, weight in zip(values, weights, strict=True)])


def agreed(values: Float[Tensor, "adapters out in"], election: str = "sum") -> Float[Tensor, "out in"]:
    """The mean of those entries that have the elected sign (TIES, Yadav et al. 2023, algorithm 1, steps 2 and 3).

    The sign is that of the sum, or of the majority where ``election`` is ``count``. Zeros neither vote nor count. A
    draw elects nobody and gives zero: either sign would be an accident of rounding or of the order of the adapters.
    """
    if values.numel() == 0:
        return values.sum(0)
    bars = _ROUNDING * torch.stack([one.abs().max() for one in values])[:, None, None]
    rows = max(1, _BLOCK // values.shape[2])
    return torch.cat(
        [_agreed(values[:, start : start + rows], bars, election) for start in range(0, values.shape[1], rows)]
    )


_BLOCK = 1 << 15
"""Entries of an adapter that are voted on at once: few enough to stay in the processor's cache."""


def _agreed(
    values: Float[Tensor, "adapters out in"], bars: Float[Tensor, "adapters 1 1"], election: str
) -> Float[Tensor, "out in"]:
    """The same for some rows; an entry above its adapter's bar is no rounding."""
    counts = values.abs() > bars
    # Where everybody's entry is as small as rounding, these few decide, so that one adapter alone stays as it is.
    votes = values.double() if election == "sum" else values.sign().double() * torch.where(counts, 1, _ROUNDING)
    total = votes.sum(0)
    decided = total.abs() > _ROUNDING * votes.abs().sum(0)
    agree = (values.sign() == total.sign()) & decided
    return torch.where(agree, values, 0).sum(0) / (agree & counts).sum(0).clamp(min=1)
