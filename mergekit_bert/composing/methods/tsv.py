"""TSV-Merge: the leading singular directions of every task, made orthogonal to each other (Gargiulo et al. 2024).

arXiv 2412.00081: ``U = [U1 | … | UT]``, ``Σ`` of all tasks side by side, ``V`` likewise; ``U`` and ``V``
are replaced by their polar factors (Procrustes). The paper takes ``1/T`` of a matrix's directions from each task, so
that all fit into one matrix. That is more than a LoRA has: the rest of the paper's directions would be arbitrary
vectors of its null space, with a singular value of zero, that bend the real ones in the polar factor. So a share here
is of the numerical rank, all of it where nothing else is said; ``share`` of ``1/T`` is the paper's for full ranks.
"""

import math
from dataclasses import dataclass

from mergekit_bert.adapters.delta import Delta, LowRank
from mergekit_bert.composing.entrywise import portion
from mergekit_bert.composing.method import Method, Site
from mergekit_bert.composing.spectral import Spectrum, polar, side_by_side, spectra
from mergekit_bert.option import option


@dataclass(frozen=True)
class Options:
    """How many directions are kept."""

    share: float = option(1.0, "share of each adapter's singular directions that is kept, rounded up", low=0, high=1)


def _leading(part: Spectrum, share: float) -> Spectrum:
    u, values, vh = part
    count = math.ceil(portion(share, len(values)))
    return u[:, :count], values[:count], vh[:count]


def _merge(site: Site) -> Delta:
    left, values, right = side_by_side([_leading(part, site.options.share) for part in spectra(site)])
    return LowRank(polar(left) * values, polar(right.T).T)


RECORD = Method(
    name="tsv",
    description="leading singular directions of each, made orthogonal to those of the others",
    formula="Δ = polar([U1 | …]) diag(S1, …) polar([V1 | …])ᵀ, of λi Δi = Ui Si Viᵀ",
    source="arXiv 2412.00081",
    merge=_merge,
    options=Options,
    one_stays={"share": 1},
)
