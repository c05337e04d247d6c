"""Packing: concatenated rows without padding, ``(1, tokens, width)``, in transformers' own modules.

No architecture is reimplemented; row boundaries matter in two places only. Attention, the only operation across tokens,
is a function registered with transformers' attention interface. And if the head uses only the first token of each row,
the last layer drops the others right after attention: from there on tensors have the shape ``(rows, 1, width)``, which
the pooler and the head treat as rows of one token.

The layout of a forward pass is an argument of :func:`laid_out`. A context variable passes it to these places, not the
modules, so that threads do not affect each other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ATTENTION = "mbert"
"""The name of our attention in transformers' interface."""

_PACKED = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "modernbert"}
"""Model types in which only attention works across tokens and the head reads the first token. Others are padded."""

_COUNTED = {"roberta", "xlm-roberta", "camembert"}
"""Model types whose positions start at ``padding_idx + 1`` and skip padding tokens."""

_NEAR = 0.75
"""Rows share an attention block if none is shorter than this share of the longest."""

_POST_ATTENTION = ("attention.output", "sa_layer_norm")
"""The module after attention in a layer: BERT and similar models, DistilBERT."""

_SELF_ATTENTION = ("attention.self", "attn", "attention")
"""The module that calls the attention function in a layer: BERT and similar models, ModernBERT, DistilBERT."""

PREFIX = "prefix"
"""The name of the child of an attention module that returns the prefixes of the rows."""


@dataclass(frozen=True)
class Block:
    """Rows of similar length as one padded block for attention, ``(rows, heads, width, …)``.

    ``rows`` are their indices in the batch. ``slots`` has the index of the batch's ``tokens · heads`` vectors for each
    slot of the block (for padding, the row's first). ``keep`` is False for padding; None if there is no padding.
    """

    rows: Int[Tensor, "rows"]
    width: int
    slots: Int[Tensor, "slots"]
    keep: Bool[Tensor, "rows 1 width"] | None


class Prefix(NamedTuple):
    """Keys and values that precede those of each row's tokens; ``keep``: which of them the row has (None: all)."""

    keys: Float[Tensor, "rows heads length width"]
    values: Float[Tensor, "rows heads length width"]
    keep: Bool[Tensor, "rows length"] | None


class Piece(NamedTuple):
    """A run of vectors that belong to one adapter."""

    adapter: int
    start: int
    stop: int


def runs(adapters: Sequence[int]) -> list[Piece]:
    """Runs of equal numbers."""
    found, start = list[Piece](), 0
    for adapter, places in groupby(adapters):
        stop = start + len(list(places))
        found.append(Piece(adapter, start, stop))
        start = stop
    return found


@dataclass(frozen=True)
class Layout:
    """The lengths of a batch's rows and, if it mixes adapters, the adapter of each row: ``adapters``, in rising order.

    ``every_token``: the head reads all tokens, so none is dropped.
    """

    lengths: tuple[int, ...]
    device: torch.device
    adapters: tuple[int, ...] = ()
    every_token: bool = False

    @cached_property
    def row_pieces(self) -> list[Piece]:
        """Each adapter's rows."""
        return runs(self.adapters)

    @cached_property
    def token_pieces(self) -> list[Piece]:
        """Each adapter's tokens."""
        ends = [0, *accumulate(self.lengths)]
        return [Piece(adapter, ends[start], ends[stop]) for adapter, start, stop in self.row_pieces]

    @cached_property
    def starts(self) -> Int[Tensor, "rows"]:
        """The place of each row's first token."""
        return torch.tensor([0, *accumulate(self.lengths)][:-1], device=self.device)

    @cached_property
    def positions(self) -> Int[Tensor, "tokens"]:
        """Each token's place in its row."""
        return torch.cat([torch.arange(length, device=self.device) for length in self.lengths])

    @cached_property
    def _known(self) -> dict[int, tuple[list[Block], Tensor]]:
        return {}

    def blocks(self, heads: int) -> tuple[list[Block], Int[Tensor, "vectors"]]:
        """The rows in blocks of near length, the longest first, and where in them each of the batch's vectors lies."""
        if heads not in self._known:
            order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])
            cuts, longest = [0], self.lengths[order[0]]
            for place, row in enumerate(order):
                if self.lengths[row] < _NEAR * longest:
                    cuts.append(place)
                    longest = self.lengths[row]
            blocks = [self._block(order[start:stop], heads) for start, stop in pairwise([*cuts, len(order)])]
            slots = torch.cat([block.slots for block in blocks])
            real = torch.cat([_everywhere(block, heads) for block in blocks]).nonzero()[:, 0]
            places = torch.empty(len(self.positions) * heads, dtype=torch.long, device=self.device)
            self._known[heads] = blocks, places.scatter_(0, slots[real], real)
        return self._known[heads]

    def _block(self, rows: Sequence[int], heads: int) -> Block:
        lengths = torch.tensor([self.lengths[row] for row in rows], device=self.device)
        step = torch.arange(int(lengths[0]), device=self.device)
        keep = (step < lengths[:, None])[:, None]
        places = torch.tensor(rows, device=self.device)
        starts = self.starts[places][:, None, None]
        tokens = starts + torch.where(keep, step, 0)
        slots = tokens * heads + torch.arange(heads, device=self.device)[:, None]
        return Block(places, len(step), slots.flatten(), None if bool(keep.all()) else keep)


def _everywhere(block: Block, heads: int) -> Bool[Tensor, "slots"]:
    """Which slots of a block hold a token."""
    if block.keep is None:
        return torch.ones_like(block.slots, dtype=torch.bool)
    return block.keep.expand(-1, heads, -1).flatten()


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Inside the block, this thread's forward passes use ``layout``."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def pieces(x: Float[Tensor, "... width"]) -> list[Piece]:
    """The vectors of ``x`` by adapter in this forward pass: packed tokens, or one vector per row."""
    layout = _LAYOUT.get()
    if layout is None or not layout.adapters:
        raise RuntimeError("a routed module needs a layout with adapters")
    count = x.shape[:-1].numel()
    if count == len(layout.positions):
        return layout.token_pieces
    if layout.every_token and count == 1:  # BERT's pooler, which no head reads then
        return []
    if count != len(layout.lengths):
        raise RuntimeError(f"a routed module got {count} vectors, expected one per row or one per token")
    return layout.row_pieces


def owned(count: int) -> list[Piece]:
    """``count`` tokens or rows by adapter in this forward pass: all adapter 0's if the layout has no adapters."""
    layout = _LAYOUT.get()
    if layout is None or not layout.adapters:
        return [Piece(0, 0, count)]
    return layout.token_pieces if count == len(layout.positions) else layout.row_pieces


def enable(model: nn.Module) -> None:
    """Prepare a transformers encoder for packed rows, if its architecture allows it. Padded rows still work."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    stack = layers(model)
    config: Any = model.config
    plain = (
        getattr(config, "classifier_pooling", "cls") == "cls"
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "chunk_size_feed_forward", 0)
    )
    if not stack or not plain or config.model_type not in _PACKED:
        return
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda **given: None if _LAYOUT.get() else eager_mask(**given))
    for part in model.modules():
        own: Any = getattr(part, "config", None)
        if own is not None:
            own._attn_implementation = ATTENTION
    for name in _POST_ATTENTION:
        with contextlib.suppress(AttributeError):
            stack[-1].get_submodule(name).register_forward_pre_hook(_drop_inputs)
    stack[-1].register_forward_hook(_drop_output)


def enabled(model: nn.Module) -> bool:
    """Whether ``model`` takes packed rows."""
    config: Any = model.config
    return bool(config._attn_implementation == ATTENTION)


def layers(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers, the lowest first; empty if they cannot be identified."""
    config: Any = model.config
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    return list(stacks[0]) if len(stacks) == 1 else []


def attention_names(model: nn.Module) -> list[str]:
    """The modules that call the attention function, the lowest layer's first; of an encoder that is :func:`enabled`."""
    stack = layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    inner = next(one for one in _SELF_ATTENTION if all(_has(layer, one) for layer in stack))
    return [f"{names[id(layer)]}.{inner}" for layer in stack]


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def position_ids(model: nn.Module, ids: Int[Tensor, "tokens"], layout: Layout) -> Int[Tensor, "tokens"]:
    """The position of each token, as the architecture counts them."""
    config: Any = model.config
    if config.model_type not in _COUNTED:
        return layout.positions
    real = ids != config.pad_token_id
    counted = real.cumsum(0)
    before = (counted - real.long())[layout.starts]
    rows = torch.repeat_interleave(torch.tensor(layout.lengths, device=ids.device))
    positions: Tensor = (counted - before[rows]) * real + int(config.pad_token_id)
    return positions


def _drop(x: Any, layout: Layout) -> Any:
    """First tokens alone, ``(rows, 1, width)``, of a packed tensor; anything else as it is."""
    if (
        layout.every_token
        or not isinstance(x, Tensor)
        or x.dim() != 3
        or x.shape[0] != 1
        or x.shape[1] != len(layout.positions)
    ):
        return x
    return x[0].index_select(0, layout.starts)[:, None]


def _drop_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    layout = _LAYOUT.get()
    return None if layout is None else tuple(_drop(x, layout) for x in inputs)


def _drop_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    layout = _LAYOUT.get()
    if layout is None:
        return output
    return tuple(_drop(x, layout) for x in output) if isinstance(output, tuple) else _drop(output, layout)


def mean(
    states: Float[Tensor, "_ _ width"], mask: Int[Tensor, "rows tokens"] | None = None
) -> Float[Tensor, "rows width"]:
    """The mean over the tokens of each row: packed or padded as this forward pass is laid out, else those of ``mask``.

    Without either, all that ``states`` holds of a row counts.
    """
    layout, wide = _LAYOUT.get(), states.to(torch.promote_types(states.dtype, torch.float32))
    if layout is not None:
        lengths = torch.tensor(layout.lengths, device=states.device)
        if len(states) == 1 and states.shape[1] == len(layout.positions):
            rows = torch.repeat_interleave(lengths)
            sums = wide.new_zeros(len(lengths), states.shape[-1]).index_add(0, rows, wide[0])
            return sums / lengths[:, None]
        mask = (torch.arange(states.shape[1], device=states.device) < lengths[:, None]).long()
    if mask is None:
        return wide.mean(1)
    kept = mask[..., None].to(wide.dtype)
    return (wide * kept).sum(1) / kept.sum(1)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "rows heads tokens width"],
    key: Float[Tensor, "rows heads tokens width"],
    value: Float[Tensor, "rows heads tokens width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows tokens heads width"], None]:
    """Attention as transformers calls it. Packed rows come as one row of all tokens; ``scaling`` is 1/√width if None.

    ``sliding_window`` is the first distance at which tokens do not see each other.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout = _LAYOUT.get()
    prefix = _prefix(module, len(query) if layout is None else len(layout.lengths), key.dtype)
    if layout is None:
        if prefix is not None:
            key, value = torch.cat([prefix.keys, key], 2), torch.cat([prefix.values, value], 2)
            length = prefix.keys.shape[2]
            attention_mask = None if attention_mask is None else functional.pad(attention_mask, (length, 0))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if attention_mask is None else scores + attention_mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None
    heads = (x[0].transpose(0, 1) for x in (query, key, value))
    front = (None, None, None) if prefix is None else prefix
    out: Tensor = _PackedAttention.apply(*heads, *front, layout, scaling, sliding_window)  # type: ignore[no-untyped-call]
    return out[None], None


def _prefix(module: nn.Module, rows: int, dtype: torch.dtype) -> Prefix | None:
    """What the rows see before their tokens, in the dtype of these; None where nothing hangs beside ``module``."""
    hung = getattr(module, PREFIX, None)
    found: Prefix | None = None if hung is None else hung(rows)
    return found and Prefix(found.keys.to(dtype), found.values.to(dtype), found.keep)


def _bias(
    block: Block, window: int | None, length: int, own: Bool[Tensor, "all length"] | None, device: torch.device
) -> Float[Tensor, "_ 1 _ _"] | None:
    """What is added to the scores: the least number where a token must not be seen.

    A prefix of ``length`` before the tokens is seen from everywhere, or as far as it is the row's ``own``.
    """
    keep = None if block.keep is None else block.keep[:, :, None]
    if window is not None and block.width > window:
        step = torch.arange(block.width, device=device)
        near = (step[:, None] - step).abs() < window
        keep = near[None, None] if keep is None else keep & near
    if own is not None or (length and keep is not None):
        front = torch.ones(1, length, dtype=torch.bool, device=device) if own is None else own[block.rows]
        keep = torch.ones(1, 1, 1, block.width, dtype=torch.bool, device=device) if keep is None else keep
        rows = max(len(front), len(keep))
        parts = (front[:, None, None].expand(rows, 1, keep.shape[2], -1), keep.expand(rows, -1, -1, -1))
        keep = torch.cat(parts, -1)
    if keep is None:
        return None
    return torch.zeros(keep.shape, device=device).masked_fill(~keep, torch.finfo(torch.float32).min)


class _PackedAttention(torch.autograd.Function):
    """Softmax attention inside each row: plain matrix products on blocks of rows of near length.

    At the lengths of sentences they are faster than a fused kernel, whose backward pass is slow on a CPU. The softmax
    is taken in float32, which on a CPU is faster than bfloat16 too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "tokens heads width"],
        key: Float[Tensor, "tokens heads width"],
        value: Float[Tensor, "tokens heads width"],
        keys: Float[Tensor, "rows heads length width"] | None,
        values: Float[Tensor, "rows heads length width"] | None,
        own: Bool[Tensor, "rows length"] | None,
        layout: Layout,
        scaling: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads width"]:
        blocks, places = layout.blocks(query.shape[1])
        length = 0 if keys is None else keys.shape[2]
        found, kept = list[Tensor](), list[Tensor]()
        for block in blocks:
            q, k, v = (_gather(x, block) for x in (query, key, value))
            k, v = (x if y is None else torch.cat([y[block.rows], x], 2) for x, y in ((k, keys), (v, values)))
            scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(scaling)
            bias = _bias(block, window, length, own, scores.device)
            chances = torch.softmax(scores if bias is None else scores.add_(bias), -1).to(q.dtype)
            found.append(torch.matmul(chances, v))
            kept += [q, k, v, chances]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scaling, ctx.prefix = layout, scaling, None if keys is None else keys.shape
        return _scatter(found, places, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        blocks, places = ctx.layout.blocks(gradient.shape[1])
        by_query, by_key, by_value = list[Tensor](), list[Tensor](), list[Tensor]()
        by_keys, by_values = (None if ctx.prefix is None else gradient.new_zeros(ctx.prefix) for _ in range(2))
        for place, block in enumerate(blocks):
            q, k, v, chances = ctx.saved_tensors[4 * place : 4 * place + 4]
            g = _gather(gradient, block)
            g = g if block.keep is None else g.mul_(block.keep[..., None])
            by_chance = torch.matmul(g, v.transpose(-1, -2)).float()
            by_score = torch._softmax_backward_data(by_chance, chances.float(), -1, torch.float32)
            by_score = by_score.mul_(ctx.scaling).to(q.dtype)
            by_query.append(torch.matmul(by_score, k))
            by_k, by_v = torch.matmul(by_score.transpose(-1, -2), q), torch.matmul(chances.transpose(-1, -2), g)
            if by_keys is not None and by_values is not None:
                length = by_keys.shape[2]
                by_keys[block.rows], by_values[block.rows] = by_k[:, :, :length], by_v[:, :, :length]
                by_k, by_v = by_k[:, :, length:], by_v[:, :, length:]
            by_key.append(by_k)
            by_value.append(by_v)
        scattered = (_scatter(x, places, gradient.shape) for x in (by_query, by_key, by_value))
        return *scattered, by_keys, by_values, *(None,) * 4


def _gather(x: Float[Tensor, "tokens heads width"], block: Block) -> Float[Tensor, "rows heads length width"]:
    """The vectors of a block's rows; in a padded slot, the row's first."""
    vectors = x.reshape(-1, x.shape[2]).index_select(0, block.slots)
    return vectors.view(len(block.rows), x.shape[1], block.width, x.shape[2])


def _scatter(found: Sequence[Tensor], places: Tensor, shape: torch.Size) -> Float[Tensor, "tokens heads width"]:
    """The vectors of all blocks, back where they lie in the batch."""
    flat = [x.reshape(-1, shape[2]) for x in found]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, places).view(shape)
