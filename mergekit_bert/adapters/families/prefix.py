"""Prefix tuning: trained keys and values that every layer's attention sees before those of the row's own tokens.

Li & Liang 2021 (arXiv 2101.00190) reparametrise them in training, by an MLP over smaller embeddings; Liu et al. 2022
(P-tuning v2, arXiv 2110.07602) train them as they are, which they find as good for classification, and short ones the
better for simple tasks. What is kept are the keys and values either way. As in both, and in PEFT, where an encoder has
an embedding for each position, those of the tokens begin after the prefix. Rotary positions are distances, and a prefix
has none: its keys are not turned, and every window sees it.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.config import PrefixOptions
from mergekit_bert.adapters.extra import Extra, Shapes, Size, Virtual
from mergekit_bert.adapters.family import Family, Tensors
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.classifier import share
from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.sites import ROLES, linear_layers
from mergekit_bert.errors import EncoderError
from mergekit_bert.patterns import matches

_POSITIONS = "embeddings.position_embeddings"


def _size(encoder: Encoder) -> Size:
    """(layers, width)."""
    if not packing.enabled(encoder.model):
        raise EncoderError(
            f"base {encoder.name!r}",
            f"attention of {encoder.config.model_type}, which mbert does not compute itself",
            "an architecture that is packed, for a prefix",
            "choose another `type`",
        )
    return encoder.config.num_hidden_layers, encoder.config.hidden_size


def _shapes(options: PrefixOptions, size: Size) -> dict[str, tuple[int, ...]]:
    """``key`` and ``value`` (layers, length, width)."""
    layers, width = size
    return dict.fromkeys(("key", "value"), (layers, options.length, width))


def _size_of(shapes: Shapes) -> Size:
    layers, _, width = shapes["key"]
    return layers, width


def _init(options: PrefixOptions, encoder: Encoder, source: torch.Generator) -> dict[str, Tensor]:
    """The encoder's own keys and values of random words, which are of a size that it knows (Li & Liang, section 7.4).

    The MLP begins with weights by which it gives them: standard normal embeddings, a first layer uniform on ±1/√in,
    and the smallest last layer that fits.
    """
    size = _size(encoder)
    width = size[1]
    words = _of_words(encoder, torch.randint(encoder.words.num_embeddings, (options.length,), generator=source))
    if not options.projection:
        return words
    embedding = torch.randn(options.length, width, generator=source)
    bound = 1 / math.sqrt(width)
    inner, inner_bias = ((torch.rand(shape, generator=source) * 2 - 1) * bound for shape in ((width, width), (width,)))
    hidden = functional.linear(embedding, inner, inner_bias).tanh()
    target = torch.stack([words["key"], words["value"]], 1).flatten(0, 1).transpose(0, 1).flatten(1)
    outer = torch.linalg.lstsq(hidden.double(), target.double(), driver="gelsd").solution.float().T.contiguous()
    return {
        "embedding": embedding,
        "inner": inner,
        "inner_bias": inner_bias,
        "outer": outer,
        "outer_bias": torch.zeros(2 * math.prod(size)),
    }


def _of_words(encoder: Encoder, ids: Int[Tensor, "length"]) -> dict[str, Tensor]:
    """``key`` and ``value`` (layers, length, width) that the encoder makes of these tokens, one after the other."""
    tree, found = share(encoder.model), dict[str, list[Tensor]](key=[], value=[], qkv=[])

    def keep(role: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[role].append(output[0].float().cpu())

    for name in linear_layers(encoder):
        for role in found:
            if matches(ROLES[role], name):
                tree.get_submodule(name).register_forward_hook(partial(keep, role))
    with torch.no_grad():
        tree(input_ids=ids[None].to(encoder.words.weight.device))
    for together in found["qkv"]:
        _, key, value = together.chunk(3, -1)
        found["key"].append(key)
        found["value"].append(value)
    return {name: torch.stack(found[name]) for name in ("key", "value")}


def _of_layer(tensors: Tensors, layer: int, layers: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, (length, width): as they are, or by the MLP, always in float32."""
    if "key" in tensors:
        return tensors["key"][layer], tensors["value"][layer]
    embedding = tensors["embedding"]
    with torch.autocast(embedding.device.type, enabled=False):
        hidden = functional.linear(embedding, tensors["inner"], tensors["inner_bias"]).tanh()
        outer, bias = (tensors[name].chunk(layers)[layer] for name in ("outer", "outer_bias"))
        key, value = functional.linear(hidden, outer, bias).chunk(2, -1)
    return key, value


def _kept(size: Size, tensors: Tensors) -> dict[str, Tensor]:
    """All layers' keys and values."""
    with torch.no_grad():
        layers = [_of_layer(tensors, layer, size[0]) for layer in range(size[0])]
    return {name: torch.stack(found) for name, found in zip(("key", "value"), zip(*layers, strict=True), strict=True)}


class Prefixes(nn.Module):
    """Beside a layer's attention: the prefix of each row's adapter, by :func:`~mergekit_bert.encoder.packing.owned`."""

    def __init__(self, given: Mapping[int, Mapping[str, nn.Parameter]], layer: int, config: Any) -> None:
        """``given`` are the tensors of the adapters that have one, by number."""
        super().__init__()
        self.layer, self.layers, self.heads = layer, config.num_hidden_layers, config.num_attention_heads
        self.given = nn.ModuleDict({str(number): nn.ParameterDict(own) for number, own in given.items()})

    def forward(self, rows: int) -> packing.Prefix | None:
        """What ``rows`` rows see before their tokens; None where none of them has a prefix."""
        pieces = packing.owned(rows)
        found = {one.adapter: self._heads(one.adapter) for one in pieces if str(one.adapter) in self.given}
        if not found:
            return None
        length = max(key.shape[1] for key, _ in found.values())
        empty = next(iter(found.values()))[0][:, :0]
        parts = [found.get(one.adapter, (empty, empty)) for one in pieces]
        counts = [one.stop - one.start for one in pieces]
        keys, values = (
            torch.cat([_longer(x, length).expand(count, -1, -1, -1) for x, count in zip(side, counts, strict=True)])
            for side in zip(*parts, strict=True)
        )
        lengths = [key.shape[1] for key, _ in parts]
        if min(lengths) == length:
            return packing.Prefix(keys, values, None)
        step = torch.arange(length, device=keys.device)
        own = [(step < own_length).expand(count, -1) for own_length, count in zip(lengths, counts, strict=True)]
        return packing.Prefix(keys, values, torch.cat(own))

    def _heads(self, adapter: int) -> tuple[Tensor, Tensor]:
        """(heads, length, width of a head)."""
        own: Any = self.given[str(adapter)]
        key, value = (
            one.unflatten(1, (self.heads, -1)).transpose(0, 1)
            for one in _of_layer(dict(own.items()), self.layer, self.layers)
        )
        return key, value


def _longer(x: Float[Tensor, "heads _ width"], length: int) -> Float[Tensor, "heads length width"]:
    return functional.pad(x, (0, 0, 0, length - x.shape[1]))


class Positions(nn.Embedding):
    """An encoder's position embeddings, which begin after the prefix of each row's adapter."""

    def __init__(self, old: nn.Embedding, lengths: Mapping[int, int]) -> None:
        """``lengths`` are those of the prefixes, by the adapters' numbers."""
        super().__init__(len(old.weight), old.embedding_dim, old.padding_idx, _weight=old.weight)
        self.weight, self.lengths = old.weight, lengths

    def forward(self, positions: Int[Tensor, "_ _"]) -> Float[Tensor, "_ _ width"]:
        """The embeddings; those of padding, where it has a position of its own (RoBERTa), stay in their place."""
        pieces = packing.owned(positions.numel())
        lengths = [self.lengths.get(one.adapter, 0) for one in pieces]
        counts = torch.tensor([one.stop - one.start for one in pieces], device=positions.device)
        moved = torch.tensor(lengths, device=positions.device).repeat_interleave(counts).view(positions.shape)
        if self.padding_idx is not None:
            moved = moved * (positions != self.padding_idx)
        return super().forward(positions + moved)


def _modules(tree: nn.Module, given: Mapping[int, Mapping[str, nn.Parameter]]) -> dict[str, nn.Module]:
    """A :class:`Prefixes` in every layer, and the positions after them."""
    found: dict[str, nn.Module] = {
        f"{name}.{packing.PREFIX}": Prefixes(given, layer, tree.config)
        for layer, name in enumerate(packing.attention_names(tree))
    }
    names = {name for name, _ in tree.named_modules()}
    if _POSITIONS in names:
        old = tree.get_submodule(_POSITIONS)
        assert isinstance(old, nn.Embedding)
        found[_POSITIONS] = Positions(old, {number: _length(own) for number, own in given.items()})
    return found


def _length(tensors: Mapping[str, Tensor]) -> int:
    return tensors["key"].shape[1] if "key" in tensors else tensors["embedding"].shape[0]


PREFIX = Extra(
    name="prefix",
    size=_size,
    shapes=_shapes,
    size_of=_size_of,
    init=_init,
    kept=_kept,
    modules=_modules,
    virtual=lambda shapes: Virtual(keys=shapes["key"][1]),
)

RECORD = Family(
    name="prefix",
    description="trained keys and values that every layer sees before the tokens",
    source="arXiv 2101.00190, arXiv 2110.07602",
    options=PrefixOptions,
    extras=(PREFIX,),
    lr=1e-2,
    head_lr=1e-2,
)
