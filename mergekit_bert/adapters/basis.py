"""The orthogonal basis: fixed factors ``A`` that are orthogonal across tasks (OrthoAda, arXiv 2312.02432).

For every site there is one orthogonal matrix ``Q (in, in)``, known from a seed and the site's name. An adapter of rank
``r`` freezes ``r`` rows of it as its ``A`` and trains only ``B``; adapters that took different rows have
``Δi Δjᵀ = 0``. The paper draws ``Q`` at random; here it is the structured random rotation ``Q = C D₂ C D₁`` (``C`` the
orthonormal cosine transform, ``D`` random signs; Ailon & Chazelle 2009), whose rows are orthogonal to float64
precision and cost O(in · log in) each, so that a file stores row numbers instead of rows. The signs come from
SHAKE-256, hence the same rows on every machine.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy import fft
from torch import Tensor

from mergekit_bert.errors import BasisError
from mergekit_bert.schema import STRICT, Count, Seed, Width


@dataclass(frozen=True)
class BasisRows:
    """Rows ``start … start + count - 1`` of the basis with this seed, at every site."""

    seed: Seed
    start: Count
    count: Width

    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        """Raise BasisError for numbers that name no rows."""
        numbers = (self.seed, self.start, self.count)
        if not all(type(number) is int for number in numbers) or self.start < 0 or self.count < 1:
            raise BasisError(
                "basis rows",
                f"seed {self.seed!r}, start {self.start!r}, count {self.count!r}",
                "whole numbers, the count at least 1",
                "correct them",
            )

    def overlaps(self, other: "BasisRows") -> bool:
        """Whether both share a row of one basis."""
        apart = self.start + self.count <= other.start or other.start + other.count <= self.start
        return self.seed == other.seed and not apart

    def to_json(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {"seed": self.seed, "start": self.start, "count": self.count}

    def matrix(self, site: str, in_features: int) -> Float[Tensor, "count in"]:
        """The rows at ``site`` in float32; raises BasisError where the site is too narrow."""
        if self.start + self.count > in_features:
            raise BasisError(
                f"basis rows {self.start} to {self.start + self.count - 1}",
                f"site {site!r} has {in_features} input features",
                "rows that exist at every site",
                "use a smaller rank, other `targets`, or `basis=random`",
            )
        first, second = _signs(self.seed, site, in_features)
        unit = np.zeros((self.count, in_features))
        unit[np.arange(self.count), np.arange(self.start, self.start + self.count)] = 1.0
        # Row k of C D₂ C D₁ is D₁ Cᵀ D₂ Cᵀ eₖ, and Cᵀ is the inverse transform.
        inner = fft.idct(unit, norm="ortho", axis=1) * second
        rows = fft.idct(inner, norm="ortho", axis=1) * first
        return torch.from_numpy(rows).float()


def _signs(seed: int, site: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of ±1."""
    stream = hashlib.shake_256(f"mbert basis {seed} {site}".encode()).digest(2 * ((width + 7) // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8)).reshape(2, -1)[:, :width]
    first, second = 1.0 - 2.0 * bits
    return first, second


def shared_basis(rows: Mapping[str, BasisRows | None]) -> None:
    """Raise BasisError unless all named adapters took different rows of one basis."""
    remedy = "train them with `basis=orthogonal` and one ledger (the default), or use `method=fedavg`"
    without = [name for name, one in rows.items() if one is None]
    if without:
        raise BasisError(
            "orthoada",
            f"{', '.join(without)} trained without an orthogonal basis",
            "adapters that share one basis",
            remedy,
        )
    known = {name: one for name, one in rows.items() if one is not None}
    seeds = sorted({one.seed for one in known.values()})
    if len(seeds) > 1:
        told = ", ".join(f"{name} seed {one.seed}" for name, one in known.items())
        raise BasisError("orthoada", f"different bases ({told})", "one shared basis", remedy)
    pairs: Sequence[tuple[str, BasisRows]] = list(known.items())
    for place, (name, one) in enumerate(pairs):
        for other, two in pairs[place + 1 :]:
            if one.overlaps(two):
                raise BasisError(
                    "orthoada",
                    f"{name} (rows {one.start}–{one.start + one.count - 1}) and {other} "
                    f"(rows {two.start}–{two.start + two.count - 1}) collide in the basis",
                    "rows that no two adapters share",
                    f"train {other} again in the folder of {name}, whose basis.json hands the rows out",
                )
