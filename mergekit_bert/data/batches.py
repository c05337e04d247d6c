"""Batches: tokenised rows end to end, of like length (attention then pads little), in an order that repeats."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mergekit_bert.data.kind import Label, kind_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.hardware import generator

_WINDOW = 16
"""Training batches are sorted by length within this many shuffled batches."""

TOKEN_BUDGET = 4096
"""Most tokens in one forward pass. What it gives does not depend on it, beyond the order of float sums (and, in
training with dropout, which entries are drawn)."""

_TOKENIZING = threading.Lock()
"""A fast tokenizer keeps the truncation asked of it as state of its own, so that threads must take turns."""

Tokenizer = Callable[..., dict[str, list[list[int]]]]


@dataclass(frozen=True)
class Batch:
    """Some rows end to end: model inputs of shape (tokens,), the rows' lengths, and where they came from."""

    inputs: dict[str, Int[Tensor, "tokens"]]
    lengths: tuple[int, ...]
    padding: dict[str, int]
    targets: Shaped[Tensor, "rows *each"] | None
    index: list[int]

    def padded(self) -> dict[str, Int[Tensor, "rows width"]]:
        """The inputs padded to the longest row, with an attention mask, as transformers takes them."""
        step = torch.arange(max(self.lengths))
        mask = step < torch.tensor(self.lengths)[:, None]
        padded = {"attention_mask": mask.long()}
        for name, values in self.inputs.items():
            padded[name] = torch.full(mask.shape, self.padding[name]).masked_scatter_(mask, values)
        return padded


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows; ``truncated`` of them were longer than ``max_length`` tokens."""

    columns: dict[str, list[list[int]]]
    labels: tuple[Label, ...] | None
    truncated: int
    padding: dict[str, int]
    task: Task

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.columns["input_ids"])

    def length(self, row: int) -> int:
        """Tokens of one row."""
        return len(self.columns["input_ids"][row])

    def batch(self, index: list[int]) -> Batch:
        """The rows at ``index`` as one batch, its labels as the loss of the task's kind wants them."""
        inputs = {
            name: torch.tensor(list(chain.from_iterable(column[i] for i in index)))
            for name, column in self.columns.items()
        }
        return Batch(inputs, tuple(map(self.length, index)), self.padding, self._targets(index), index)

    def _targets(self, index: list[int]) -> Tensor | None:
        if self.labels is None:
            return None
        return kind_of(self.task).targets(self.task, [self.labels[i] for i in index])

    def cut(self, order: Sequence[int]) -> Iterator[list[int]]:
        """``order`` in runs of at most ``TOKEN_BUDGET`` tokens (a longer row is a run of its own)."""
        run: list[int] = []
        tokens = 0
        for row in order:
            if run and tokens + self.length(row) > TOKEN_BUDGET:
                yield run
                run, tokens = [], 0
            run.append(row)
            tokens += self.length(row)
        if run:
            yield run

    def in_order(self) -> Iterator[Batch]:
        """All rows once, the longest first (so that memory is known at once), within the token budget."""
        for run in self.cut(sorted(range(len(self)), key=lambda i: (-self.length(i), i))):
            yield self.batch(run)

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The row indices of an epoch's training batches: a function of (seed, epoch) alone."""
        source = generator(seed, epoch, 13)
        order = torch.randperm(len(self), generator=source).tolist()
        window = _WINDOW * batch_size
        batches = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=self.length)  # ties stay shuffled
            batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=source).tolist()]


def tokenise(rows: Rows, task: Task, tokenizer: Tokenizer, max_length: int, pad_token: int) -> Tokens:
    """Tokenise ``rows``, two texts of a row together as a pair; longer rows are cut to ``max_length`` and counted."""
    with _TOKENIZING:
        columns = _encode(rows, tokenizer, truncation=False)
        long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
        if long:
            cut = _encode(rows.take(long), tokenizer, truncation="longest_first", max_length=max_length)
            for name, column in columns.items():
                for place, i in enumerate(long):
                    column[i] = cut[name][place]
    padding = {name: pad_token if name == "input_ids" else 0 for name in columns}
    return Tokens(columns, rows.labels, len(long), padding, task)


def join(parts: Sequence[Tokens]) -> Tokens:
    """The unlabelled rows of several tasks, one after the other; their labels, and so their tasks, no longer count."""
    first = parts[0]
    columns = {name: [row for part in parts for row in part.columns[name]] for name in first.columns}
    return Tokens(columns, None, sum(part.truncated for part in parts), first.padding, first.task)


def _encode(rows: Rows, tokenizer: Tokenizer, **options: object) -> dict[str, list[list[int]]]:
    texts = [list(column) for column in zip(*rows.texts, strict=True)]
    columns = dict(tokenizer(*texts, verbose=False, **options))
    columns.pop("attention_mask", None)  # rows are not padded here
    return columns
