"""Learning on unlabelled rows: features and outputs of models, and the base class of the methods' objectives."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.attach import fold
from mergekit_bert.adapters.patch import Part
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import classifier
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.head import Classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, OutputError
from mergekit_bert.files import Json, fingerprint, remove
from mergekit_bert.training.checkpoint import CHECKPOINT
from mergekit_bert.training.loop import minimise
from mergekit_bert.training.objective import Objective

_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Answers:
    """A model's results for rows: the features that the head uses, and the head's outputs.

    ``hidden`` are the states of all tokens after every layer but the last; empty if not requested.
    """

    features: Float[Tensor, "rows width"]
    outputs: Float[Tensor, "rows out"]
    hidden: Sequence[Float[Tensor, "tokens states"]] = ()


class FeatureExtractor:
    """A classifier that returns features and, with ``hidden``, the states between its layers, besides its outputs.

    ``local``: no gradient passes from a layer to those below it.
    """

    def __init__(self, model: Classifier, hidden: bool = False, local: bool = False) -> None:
        """Register hooks at the layers and the end of the encoder; the caller must not share the model."""
        self.model, self.hidden = model, hidden
        self._seen: list[Tensor] = []
        self._states: list[Tensor] = []
        model.encoder.register_forward_hook(lambda module, inputs, output: self._seen.append(model.features(output[0])))
        layers = packing.layers(model.encoder)
        for layer in layers[:-1] if hidden else []:
            layer.register_forward_hook(lambda module, inputs, output: self._states.append(_first(output)))
        for layer in layers if local else []:
            layer.register_forward_pre_hook(_detached, with_kwargs=True)

    def __call__(self, batch: Batch) -> Answers:
        """The answers for the rows of ``batch``."""
        self._states.clear()
        outputs = outputs_of(self.model, batch)
        hidden = [_tokens(state, batch.lengths).float() for state in self._states]
        return Answers(self._seen.pop().float(), outputs.float(), hidden)


def _first(output: Any) -> Tensor:
    """A layer's states, which some layers give with others in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _detached(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, inputs)), {name: cut(value) for name, value in named.items()}


def _tokens(states: Float[Tensor, "..."], lengths: Sequence[int]) -> Float[Tensor, "tokens width"]:
    """The states of the tokens of rows, packed or padded."""
    if states.shape[0] == 1 and states.shape[1] == sum(lengths):
        return states[0]
    return torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])


def expert_answers(encoder: Encoder, part: Part, tokens: Tokens) -> Answers:
    """The expert's answers for all rows, in float32."""
    extractor = FeatureExtractor(classifier(fold(encoder, part), part.task, part.head))
    features, outputs = dict[int, Tensor](), dict[int, Tensor]()
    with torch.no_grad():
        for batch in tokens.in_order():
            answers = extractor(batch)
            features.update(zip(batch.index, answers.features, strict=True))
            outputs.update(zip(batch.index, answers.outputs, strict=True))
    rows = range(len(tokens))
    return Answers(torch.stack([features[row] for row in rows]), torch.stack([outputs[row] for row in rows]))


class MergeObjective(Objective):
    """The objective of a merge: warm-up over a tenth of the steps, then linear decay; no weight decay, no score."""

    error = CompositionError
    if_diverged = "use a smaller lr (`options` lr=…)"
    if_broken = "remove it to start the merge again"

    def __init__(
        self, title: str, parameters: Mapping[str, nn.Parameter], steps: int, lr: float, decided_by: Json
    ) -> None:
        """``decided_by`` is everything except the source code that determines the run; if it differs, it restarts."""
        self.title, self.parameters, self.steps, self.lr = title, parameters, steps, lr
        self.warmup = max(1, round(0.1 * steps))
        self.run = {"merge": fingerprint({"run": decided_by, "made_by": made_by()})}

    def groups(self) -> list[dict[str, Any]]:
        """All parameters in one group."""
        return [{"params": list(self.parameters.values()), "lr": self.lr}]

    def continues(self, path: Path, run: Mapping[str, Any]) -> bool:
        """Whether the checkpoint is of the same merge; others are ignored. Raises OutputError for a training run's."""
        if "merge" not in run:
            raise OutputError(
                str(path),
                "the checkpoint of an unfinished training run",
                "another place for the merge",
                "choose another `out`, or finish that run with `resume`",
            )
        return dict(run) == self.run


def descend(objective: MergeObjective, folder: Path | None = None, show: bool = False) -> list[float]:
    """Run ``objective``; returns the loss of every step.

    An interrupted run resumes from its checkpoint in ``folder``, which is removed at the end. Raises CompositionError
    for a loss that is not finite or a broken checkpoint.
    """
    losses = minimise(objective, folder, _SAVE_SECONDS, show=show).progress.losses
    if folder is not None:
        remove(folder / CHECKPOINT)
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            folder.rmdir()
    return losses
