"""Prompt tuning: trained embeddings of tokens that no text has, in every sequence (Lester et al., arXiv 2104.08691).

``place=before`` puts them before the first token, as PEFT does; a head that reads the first token then reads the first
of them. ``place=after`` puts them after it (Jia et al. 2022, arXiv 2203.12119), and the head reads ``[CLS]`` as ever.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mergekit_bert.adapters.config import PromptOptions
from mergekit_bert.adapters.extra import Extra, Shapes, Size, Virtual
from mergekit_bert.adapters.family import Family
from mergekit_bert.encoder import packing
from mergekit_bert.encoder.load import Encoder


def _size(encoder: Encoder) -> Size:
    """(width of an embedding,)."""
    return (encoder.words.embedding_dim,)


def _shapes(options: PromptOptions, size: Size) -> dict[str, tuple[int, ...]]:
    """``before`` or ``after`` (length, width)."""
    return {options.place: (options.length, *size)}


def _size_of(shapes: Shapes) -> Size:
    ((_, width),) = shapes.values()
    return (width,)


def _init(options: PromptOptions, encoder: Encoder, source: torch.Generator) -> dict[str, Tensor]:
    """The embeddings of random words of the vocabulary, as PEFT's."""
    drawn = torch.randint(encoder.words.num_embeddings, (options.length,), generator=source)
    return {options.place: encoder.words.weight.detach().cpu()[drawn].float()}


class Prompted(nn.Embedding):
    """An encoder's word embeddings, and behind them those of the prompt of each row's adapter."""

    def __init__(self, old: nn.Embedding, given: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
        """``given`` are the tensors of the adapters that have a prompt, by number."""
        super().__init__(len(old.weight), old.embedding_dim, old.padding_idx, _weight=old.weight)
        self.weight, self.first = old.weight, len(old.weight)
        self.num_embeddings += max(len(vectors) for own in given.values() for vectors in own.values())
        self.given = nn.ModuleDict({str(number): nn.ParameterDict(own) for number, own in given.items()})

    def forward(self, ids: Int[Tensor, "_ _"]) -> Float[Tensor, "_ _ width"]:
        """The embeddings of words and, of numbers beyond the last word's, of the prompt."""
        flat = ids.flatten()
        found = [self._of(one.adapter, flat[one.start : one.stop]) for one in packing.owned(len(flat))]
        return torch.cat(found).view(*ids.shape, -1)

    def _of(self, adapter: int, ids: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens width"]:
        if str(adapter) not in self.given:
            return super().forward(ids)
        own: Any = self.given[str(adapter)]
        (vectors,) = own.values()
        virtual = ids >= self.first
        words = super().forward(ids.masked_fill(virtual, 0))
        prompt = functional.embedding((ids - self.first).clamp(min=0), vectors)
        return torch.where(virtual[:, None], prompt.to(words.dtype), words)


def _modules(tree: nn.Module, given: Mapping[int, Mapping[str, nn.Parameter]]) -> dict[str, nn.Module]:
    """:class:`Prompted` in the place of the word embeddings."""
    old: nn.Embedding = tree.get_input_embeddings()  # type: ignore[operator]
    return {next(name for name, module in tree.named_modules() if module is old): Prompted(old, given)}


def _virtual(shapes: Shapes) -> Virtual:
    ((place, (length, _)),) = shapes.items()
    return Virtual(**{place: length})


PROMPT = Extra(
    name="prompt",
    size=_size,
    shapes=_shapes,
    size_of=_size_of,
    init=_init,
    kept=lambda size, tensors: dict(tensors),
    modules=_modules,
    virtual=_virtual,
)

RECORD = Family(
    name="prompt",
    description="trained embeddings of virtual tokens in every sequence",
    source="arXiv 2104.08691",
    options=PromptOptions,
    extras=(PROMPT,),
    lr=1e-2,
    head_lr=1e-2,
)
