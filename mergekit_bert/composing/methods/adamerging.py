"""AdaMerging: weights per task and layer that make predictions certain (Yang et al. 2024, arXiv 2310.02575).

The layer-wise form is ``W + Σi λi(l) Δi`` with ``λ`` found by minimising the entropy of the merged model's
predictions on unlabelled rows. The paper has classification alone. A regression has no entropy: here its outputs are
to stay near those of its expert, in units of their variance. Weights are free; the authors' code keeps them in 0…1.
"""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from mergekit_bert.composing.learning import expert_answers
from mergekit_bert.composing.linear import weighted_sum
from mergekit_bert.composing.method import Learned, LearningContext, Method
from mergekit_bert.composing.weighting import Loss, Student, WeightOptions, layer_of, learn_weights
from mergekit_bert.data.kind import kind_of
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.option import option


@dataclass(frozen=True)
class _Options(WeightOptions):
    layerwise: bool = option(True, "A weight for every adapter and layer, not one for every adapter.")


def _learn(context: LearningContext) -> Learned:
    """Weights that share a layer, or one for all sites."""
    cell = (lambda site: str(layer_of(site))) if context.options.layerwise else (lambda site: "")
    return learn_weights(context, "adamerging", cell, partial(_loss_of, context.encoder))


def _loss_of(encoder: Encoder, student: Student) -> Loss:
    """Mean entropy of the predictions; of a kind without one, the distance to the expert."""

    def outputs(run: list[int]) -> Float[Tensor, "rows out"]:
        return outputs_of(student.model, student.tokens.batch(run)).float()

    task = student.part.task
    kind = kind_of(task)
    if kind.has_entropy:
        return lambda run: kind.entropy(task, outputs(run))
    expert = expert_answers(encoder, student.part, student.tokens).outputs
    spread = float(expert.var(correction=0)) or 1.0
    return lambda run: kind.distance(task, outputs(run), expert[run], spread)


RECORD = Method(
    name="adamerging",
    description="weights per task and layer that make predictions on unlabelled rows certain",
    formula="Δ = Σ λi Δi at each layer, λ = argmin Σ tasks E[entropy], or E[(f(x) − expert(x))²] / var of a regression",
    source="arXiv 2310.02575",
    merge=weighted_sum,
    default_weights="learned on the rows; given weights are multiplied with the learned ones",
    options=_Options,
    needs=("rows",),
    learn=_learn,
    linear=True,
    random=True,
    one_stays={"start": 1.0, "steps": 0},
)
