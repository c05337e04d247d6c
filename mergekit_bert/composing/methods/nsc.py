"""NSC merging: weights by which rows reach the directions that each adapter sees (Lee et al. 2026, arXiv 2603.26317).

The null-space ratio of an input ``z`` of a site is the share of ``‖z‖`` that the adapter's ``A`` discards,
``ω(z) = ‖z − Aᵀ (A Aᵀ)⁻¹ A z‖ / ‖z‖``. Training lowers it, and the paper finds it to fall as a task's score rises,
whatever its kind. The weights, one for every adapter and site, minimise its mean over the tokens of unlabelled rows,
the sites of the last quarter of the layers, and the tasks, each task by its own adapter.

No head is asked. Where ``A`` is frozen (an orthogonal basis), training has not moved its null space, and the ratio says
only what the layers below do.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.delta import svd
from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.method import Learned, LearningContext, Method
from mergekit_bert.composing.weighting import Loss, Student, WeightOptions, layer_of, learn_weights
from mergekit_bert.data.batches import Batch
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.option import option


@dataclass(frozen=True)
class _Options(WeightOptions):
    start: float = option(0.4, "Weight of every adapter before the first step.")
    lr: float = option(2e-3, "Peak learning rate of the weights.", low=0.0)
    watched: float = option(0.25, "Share of an adapter's layers, from the last, where its null space is looked at.",
                            low=0.0, high=1.0)  # fmt: skip


def _learn(context: LearningContext) -> Learned:
    """Weights of every site by itself."""
    return learn_weights(context, "nsc", lambda site: site, partial(_loss_of, context.options.watched))


def _loss_of(share: float, student: Student) -> Loss:
    return _Watch(student, watched_sites(student, share))


def watched_sites(student: Student, share: float) -> list[str]:
    """The adapter's sites in the last ``share`` of the layers that it changes."""
    layers = sorted({layer for site in student.part.deltas if (layer := layer_of(site)) is not None})
    last = layers[len(layers) - math.ceil(share * len(layers)) :]
    return [site for site in student.part.deltas if layer_of(site) in last]


def null_space_ratio(z: Float[Tensor, "... in"], rows: Float[Tensor, "k in"]) -> Float[Tensor, "..."]:
    """The share of each ``‖z‖`` outside the span of the orthonormal ``rows``; 0 for a zero vector."""
    rest = z - z @ rows.T @ rows
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(rest, dim=-1) / norm(z, dim=-1).clamp(min=torch.finfo(z.dtype).tiny)
    return ratio


class _Watch:
    """The mean null-space ratio at some sites of a task's model, for rows of the task."""

    def __init__(self, student: Student, sites: list[str]) -> None:
        self.student = student
        self._found: list[Tensor] = []
        self._real: Tensor | None = None
        for site in sites:
            module = student.model.encoder.get_submodule(site)
            # The rows that Δ sees are those of A, and are there for a Delta without factors too.
            rows = svd(student.part.deltas[site])[2].to(next(module.parameters()).device, torch.float32)
            module.register_forward_pre_hook(partial(self._measure, rows))

    def __call__(self, run: list[int]) -> Float[Tensor, ""]:
        batch = self.student.tokens.batch(run)
        self._found, self._real = [], _real(self.student.model.encoder, batch)
        outputs_of(self.student.model, batch)
        return torch.stack(self._found).mean() if self._found else torch.zeros(())

    def _measure(self, rows: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ratio = null_space_ratio(inputs[0], rows)
        if self._real is not None and ratio.shape == self._real.shape:
            ratio = ratio[self._real.to(ratio.device)]
        self._found.append(ratio.mean())


def _real(encoder: nn.Module, batch: Batch) -> Tensor | None:
    """Which of a padded batch's places hold a token, (rows, width); None where rows are packed."""
    return None if packing.enabled(encoder) else batch.padded()["attention_mask"].bool()


RECORD = Method(
    name="nsc",
    description="weights by which unlabelled rows reach the directions that their adapter sees; no head is asked",
    formula="Δ = Σ λi Δi at each site, λ = argmin Σ tasks E[‖z − Pi z‖ / ‖z‖], Pi onto the rows of Δi",
    source="arXiv 2603.26317",
    merge=weighted_sum,
    default_weights="learned on the rows; given weights are multiplied with the learned ones",
    options=_Options,
    needs=("rows",),
    learn=_learn,
    linear=True,
    random=True,
    one_stays={"start": 1.0, "steps": 0},
)
