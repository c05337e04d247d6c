"""Learning on rows without labels: what models answer to them, and the descent that methods share."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_bert.adapters.adapter import Part
from mergekit_bert.adapters.attach import fold
from mergekit_bert.composing.source import made_by
from mergekit_bert.data.batches import Batch, Tokens
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.forward import outputs_of
from mergekit_bert.encoder.heads import Classifier, classifier
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.errors import CompositionError, ModelFileError, OutputError
from mergekit_bert.files import fingerprint, remove
from mergekit_bert.progress import progress_bar
from mergekit_bert.schema import Finite, Schema, SchemaError, Sha256, validate
from mergekit_bert.tensorfile import read_tensors, write_tensors

CHECKPOINT = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of every parameter."""
_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Answers:
    """What a model gives for rows: the first token's features after the last layer, and the head's outputs.

    ``hidden`` are the states after every layer but the last, of all tokens, row after row; empty if not asked for.
    """

    features: Float[Tensor, "rows width"]
    outputs: Float[Tensor, "rows out"]
    hidden: Sequence[Float[Tensor, "tokens width"]] = ()


class Reader:
    """A classifier whose features, and with ``hidden`` the states between its layers, can be read beside its outputs.

    ``local``: no gradient passes from a layer to those below it.
    """

    def __init__(self, model: Classifier, hidden: bool = False, local: bool = False) -> None:
        """Listen at the layers and the end of the encoder; the model is the caller's own."""
        self.model, self.hidden = model, hidden
        self._seen: list[Tensor] = []
        self._states: list[Tensor] = []
        model.encoder.register_forward_hook(lambda module, inputs, output: self._seen.append(output[0][:, 0]))
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
    reader = Reader(classifier(fold(encoder, part.deltas, part.shifts), part.task, part.head))
    features, outputs = dict[int, Tensor](), dict[int, Tensor]()
    with torch.no_grad():
        for batch in tokens.in_order():
            found = reader(batch)
            features.update(zip(batch.index, found.features, strict=True))
            outputs.update(zip(batch.index, found.outputs, strict=True))
    rows = range(len(tokens))
    return Answers(torch.stack([features[row] for row in rows]), torch.stack([outputs[row] for row in rows]))


def descend(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Sequence[Callable[[], Float[Tensor, ""]]]],
    steps: int,
    lr: float,
    key: Any,
    folder: Path | None = None,
    show: bool = False,
    title: str = "learn",
) -> list[float]:
    """Move ``parameters`` down ``loss`` for ``steps`` of Adam, the rate rising over a tenth of them, then falling.

    ``loss(step)`` gives terms that are added up, each computed, and its graph freed, before the next. It must be a
    function of the step alone: then a run that was killed goes on from its checkpoint in ``folder`` to the same bits.
    ``key`` is everything that determines the run but the source code: under another source it begins anew. Returns
    the loss of every step; raises CompositionError where it is not finite.
    """
    optimizer = torch.optim.Adam(parameters.values(), fused=True)
    path = folder / CHECKPOINT if folder is not None else None
    known = fingerprint({"run": key, "made_by": made_by()})
    losses = _resume(path, known, parameters, optimizer, steps)
    warmup, saved = max(1, round(0.1 * steps)), time.monotonic()
    with progress_bar(title, steps, show) as bar:
        for step in range(len(losses), steps):
            rate = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, rate)
            value = 0.0
            for term in loss(step):
                part = term()
                part.backward()
                value += part.item()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(value):
                raise CompositionError(
                    title, "a loss that is not finite", "a finite one", "use a smaller lr (`options` lr=…)"
                )
            losses.append(value)
            bar(step + 1, f"loss {value:.4f}")
            if path is not None and time.monotonic() - saved > _SAVE_SECONDS:
                _save(path, known, parameters, optimizer, losses)
                saved = time.monotonic()
    if path is not None:
        remove(path)
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            path.parent.rmdir()
    return losses


def _save(
    path: Path, key: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam, losses: list[float]
) -> None:
    tensors = {f"value.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    write_tensors(path, tensors, {"kind": "descent", "key": key, "losses": losses})


class _Descent(Schema):
    """A checkpoint's metadata."""

    kind: str
    key: Sha256
    losses: list[Finite]


def _resume(
    path: Path | None, key: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam, steps: int
) -> list[float]:
    """Put a run that was cut short back where its checkpoint left it; one of another run is passed over.

    Raises CompositionError for one that is broken, OutputError for that of a training run.
    """
    if path is None or not path.exists():
        return []
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("kind") != "descent":
            raise OutputError(
                str(path),
                "the checkpoint of an unfinished training run",
                "a place of its own",
                "choose another `out`, or finish that run with `resume`",
            )
        record = validate(_Descent, metadata)
        if record.key != key:
            return []
        expected = {f"{kind}.{name}": one for kind in ("value", *_MOMENTS) for name, one in parameters.items()}
        same = expected.keys() == tensors.keys() and len(record.losses) <= steps
        if not same or any(_kind(tensors[name]) != _kind(one) for name, one in expected.items()):
            raise SchemaError("other tensors than the run has, or more steps")
    except (ModelFileError, SchemaError) as error:
        found = error.found if isinstance(error, ModelFileError) else f"a broken checkpoint ({error})"
        raise CompositionError(
            str(path), found, "one as mbert writes it", "remove it: the merge then begins anew"
        ) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            moments = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(record.losses))), **moments}
    return record.losses


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
