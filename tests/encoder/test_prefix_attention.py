"""Packed attention with keys and values in front of a row's own, against each row alone in float64."""

import pytest
import torch
from torch import Tensor, nn

from mergekit_bert.encoder import packing
from mergekit_bert.hardware import generator

HEADS, WIDTH = 2, 4
LENGTHS = (7, 3, 6, 1, 4)


class Given(nn.Module):
    """A prefix for each row, as a module beside the attention gives it."""

    def __init__(self, prefix: packing.Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, rows: int) -> packing.Prefix:
        assert rows == len(self.prefix.keys)
        return self.prefix


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).requires_grad_()


def alone(
    query: Tensor, key: Tensor, value: Tensor, prefix: packing.Prefix, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    """Each row's softmax written out; a token sees all of its row's prefix, and the tokens in its window."""
    found, start = list[Tensor](), 0
    for row, length in enumerate(lengths):
        own = prefix.keys.shape[2] if prefix.keep is None else int(prefix.keep[row].sum())
        place = slice(start, start + length)
        q, k, v = (x[place].transpose(0, 1).double() for x in (query, key, value))
        k, v = (torch.cat([x[row, :, :own].double(), y], 1) for x, y in ((prefix.keys, k), (prefix.values, v)))
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        for one in range(length):
            for other in range(length):
                if window is not None and abs(one - other) >= window:
                    scores[:, one, own + other] = -torch.inf
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("shares", [(5, 5, 5, 5, 5), (0, 2, 5, 5, 1)])
def test_a_row_sees_its_prefix_and_its_own_tokens(window: int | None, shares: tuple[int, ...]) -> None:
    query, key, value = (drawn(sum(LENGTHS), HEADS, WIDTH, seed=seed) for seed in range(3))
    keys, values = (drawn(len(LENGTHS), HEADS, 5, WIDTH, seed=seed) for seed in (3, 4))
    keep = torch.arange(5) < torch.tensor(shares)[:, None]
    prefix = packing.Prefix(keys, values, None if bool(keep.all()) else keep)
    module = nn.Module()
    module.prefix = Given(prefix)
    heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
    with packing.laid_out(packing.Layout(LENGTHS, torch.device("cpu"))):
        out, _ = packing._attend(module, *heads, None, None, window)
    expected = alone(query, key, value, prefix, LENGTHS, window)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    inputs, scale = (query, key, value, keys, values), drawn(*expected.shape, seed=9).detach()
    found = torch.autograd.grad((out[0] * scale).sum(), inputs)
    wanted = torch.autograd.grad((expected * scale).sum(), inputs)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (found[3][~keep[:, None].expand(-1, HEADS, -1)] == 0).all()


def test_in_a_padded_batch_too() -> None:
    """All rows as long as the longest, the rest masked as transformers masks it."""
    width = max(LENGTHS)
    query, key, value = (drawn(len(LENGTHS), HEADS, width, WIDTH, seed=seed).detach() for seed in range(3))
    keys, values = (drawn(len(LENGTHS), HEADS, 5, WIDTH, seed=seed).detach() for seed in (3, 4))
    prefix, module = packing.Prefix(keys, values, None), nn.Module()
    module.prefix = Given(prefix)
    real = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask = torch.zeros(len(LENGTHS), 1, width, width).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    out, _ = packing._attend(module, query, key, value, mask)
    flat = [x.transpose(1, 2)[real] for x in (query, key, value)]
    torch.testing.assert_close(out[real].double(), alone(*flat, prefix, LENGTHS, None), rtol=1e-5, atol=1e-5)
