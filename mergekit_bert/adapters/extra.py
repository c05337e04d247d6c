"""Extras: tensors that are new to an encoder, beside the changes of those that it has.

A prefix is one (keys and values that every layer sees before a row's tokens), a prompt another (embeddings of tokens
that no text has). They belong to one task: those of several tasks cannot be added up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_bert.encoder.load import Encoder

Shapes = Mapping[str, tuple[int, ...]]
Size = tuple[int, ...]
"""What an extra takes of the encoder: how many layers, how wide."""


class Virtual(NamedTuple):
    """Virtual tokens of every sequence: ``keys`` that only attention sees, and tokens around the first of the text's.

    All count towards the most tokens of a sequence.
    """

    keys: int = 0
    before: int = 0
    after: int = 0

    @property
    def total(self) -> int:
        """How many they are."""
        return sum(self)

    def beside(self, other: "Virtual") -> "Virtual":
        """Those of both."""
        return Virtual(*(one + two for one, two in zip(self, other, strict=True)))


NONE = Virtual()
"""No virtual tokens."""


@dataclass(frozen=True)
class Extra:
    """One kind of new tensors; it is called like the family that brings it.

    ``size`` is what it takes of an encoder (raises EncoderError for one that has no place for it), ``shapes`` the
    tensors that a file keeps, by the family's options and that size; ``size_of`` is the size again, by the shapes.
    ``init`` makes what is trained as training begins, and ``kept``, of what was trained, what is kept.

    ``modules`` are the modules that bring the tensors into an encoder's tree, by where they are to be put in it: given
    either what is trained or what is kept, of each adapter by its number. ``virtual`` are the virtual tokens.
    """

    name: str
    size: Callable[[Encoder], Size]
    shapes: Callable[[Any, Size], dict[str, tuple[int, ...]]]
    size_of: Callable[[Shapes], Size]
    init: Callable[[Any, Encoder, torch.Generator], dict[str, Tensor]]
    kept: Callable[[Size, Mapping[str, Tensor]], dict[str, Tensor]]
    modules: Callable[[nn.Module, Mapping[int, Mapping[str, nn.Parameter]]], dict[str, nn.Module]]
    virtual: Callable[[Shapes], Virtual]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
