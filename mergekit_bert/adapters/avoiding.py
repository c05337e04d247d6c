"""Directions that disturb other tasks least: a frozen ``A`` along which their inputs are small (arXiv 2505.22934).

``Δi`` moves another task's outputs by ``Bi Ai x``. OSRM takes for ``Ai`` orthonormal directions of least energy
``aᵀ G a``, with ``G`` the second moments of the other tasks' features: eigenvectors of its smallest eigenvalues. There
``G`` is of the pretrained encoder (the authors' code takes each task's mean feature alone) and ``A`` is trained on.

What is chosen here:

- ``G = Σ Gj / tr Gj`` of the Gram matrices in the other adapters' files, so that every task counts alike.
- ``A`` is frozen. Trained on, it would follow its own task's features, which overlap with the others', and neither the
  small energy nor orthogonality would be left to rely on.
- ``A`` is orthogonal to the ``Aj`` of the avoided adapters, so that ``Δi Δjᵀ = 0`` as on the orthogonal basis. Small
  directions alone would collide: two tasks that avoid a third one would both take the same.
- Of directions of equal energy those nearest to fixed reference rows are taken, and in the space found the orthonormal
  rows that are nearest to them, so that ``A`` follows from the matrices and not from an eigensolver's signs and order.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_bert.adapters.adapter import Adapter
from mergekit_bert.adapters.basis import BasisRows
from mergekit_bert.adapters.config import Options
from mergekit_bert.adapters.delta import Delta, Dense, svd
from mergekit_bert.adapters.family import Size
from mergekit_bert.encoder.load import Encoder, check_base
from mergekit_bert.encoder.sites import of_the_head
from mergekit_bert.errors import BasisError, TrainingError

_REFERENCE = -1
"""Seed of the reference rows: of no ledger, for rows that an avoided adapter holds could not lead to any direction."""
_TIE = 1e-10
"""Energies that differ by less, of 1 that every task has in all, count as equal."""


@dataclass(frozen=True)
class QuietRows:
    """The rows of ``A`` by site, (rank, in) each."""

    rows: Mapping[str, Tensor]

    def matrix(self, site: str, in_features: int) -> Float[Tensor, "rank in"]:
        """The rows at ``site``, in float32."""
        return self.rows[site]


FrozenRows = BasisRows | QuietRows
"""Where the frozen ``A`` of every site comes from."""


def by_identity(others: Iterable[Adapter]) -> dict[str, Adapter]:
    """The adapters by task and SHA-256: each once, in an order of their own."""
    found = {f"{one.name} {one.sha256()}": one for one in others}
    return {name: found[name] for name in sorted(found)}


def check_avoided(
    others: Collection[Adapter], task: str, encoder: Encoder, config: Options, sites: Collection[str]
) -> None:
    """Raise TrainingError or ModelFileError unless an adapter of ``task`` can avoid ``others`` at ``sites``."""
    if config.basis == "avoid" and not others:
        raise TrainingError("`basis=avoid`", "nothing to avoid", "adapters of other tasks", "name them with `avoid`")
    if others and config.basis != "avoid":
        raise TrainingError("`avoid`", f"`basis={config.basis}`", "`basis=avoid`", "add it, or drop `avoid`")
    for one in others:
        where = f"`avoid={one.name}`"
        if one.name == task:
            raise TrainingError(where, f"an adapter of {task} itself", "those of other tasks", "leave it out")
        check_base(where, one.base, encoder)
        grams = one.statistics.get("gram", {})
        if not all(site in grams for site in sites if not of_the_head(site)):
            raise TrainingError(
                where,
                "no Gram matrices of its inputs in the file" if not grams else "no Gram matrices of some sites",
                "statistics of every site",
                f"train it again: mbert train-adapter --task {one.name} --with-stats gram",
            )


def avoiding(others: Sequence[Adapter], config: Options, sites: Mapping[str, Size]) -> QuietRows:
    """The frozen ``A`` of every site for an adapter that avoids ``others``.

    Sites that the head alone reads are never merged and have no Gram matrix: all directions are alike there. Raises
    BasisError where the others leave too few directions.
    """
    grams, deltas = [one.statistics["gram"] for one in others], [one.deltas() for one in others]
    rows = {}
    for site, (_, width) in sites.items():
        energy = torch.zeros(width, width, dtype=torch.float64)
        for own in grams:
            if site in own:
                gram = own[site].dense()
                energy += gram / gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)
        reference = BasisRows(_REFERENCE, 0, config.at(site).rank).matrix(site, width)
        taken = _directions([own[site] for own in deltas if site in own], width)
        if len(taken) + len(reference) > width:
            raise BasisError(
                f"site {site!r}",
                f"{width} input features, of which the avoided adapters use {len(taken)}",
                f"{len(reference)} free ones",
                "use a smaller `rank`, or avoid fewer adapters",
            )
        rows[site] = quiet(energy, taken, reference.double()).float()
    return QuietRows(rows)


def quiet(
    energy: Float[Tensor, "in in"], taken: Float[Tensor, "k in"], reference: Float[Tensor, "rank in"]
) -> Float[Tensor, "rank in"]:
    """Orthonormal rows of least ``energy`` among those orthogonal to ``taken``, which are orthonormal; in float64."""
    used, wanted = taken.T @ taken, reference.T @ reference
    free = torch.eye(len(energy), dtype=energy.dtype) - used
    above = 1 + energy.trace()  # what is taken gets an eigenvalue beyond all others
    _, vectors = torch.linalg.eigh(free @ (energy - _TIE * wanted) @ free + above * used)
    found = vectors[:, : len(reference)]
    left, _, right = torch.linalg.svd(reference @ found)
    nearest: Tensor = left @ right @ found.T
    return nearest


def _directions(deltas: Sequence[Delta], width: int) -> Float[Tensor, "k in"]:
    """Orthonormal rows that span what all of ``deltas`` read, in float64."""
    each = [svd(Dense(one.reads))[2] for one in deltas]  # of one size, whatever that of the factor
    return svd(Dense(torch.cat([torch.zeros(0, width, dtype=torch.float64), *each])))[2]
