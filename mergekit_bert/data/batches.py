"""Batches: tokenised rows end to end, of like length (attention then pads little), in an order that repeats."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mergekit_bert.data.kind import Label, kind_of
from mergekit_bert.data.rows import Rows
from mergekit_bert.data.task import Task
from mergekit_bert.errors import DataError
from mergekit_bert.hardware import generator

_WINDOW = 16
"""Training batches are sorted by length within this many shuffled batches."""

TOKEN_BUDGET = 4096
"""Most tokens in one forward pass. What it gives does not depend on it, beyond the order of float sums (and, in
training with dropout, which entries are drawn)."""

CHARACTERS = 64
"""Most characters of a text that are read for each token of ``max_length``; ordinary text has about four a token."""

_ROWS = 128
"""Rows tokenised in one call, which bounds the memory that their uncut tokens take."""


@dataclass(frozen=True)
class Batch:
    """Some rows end to end: model inputs of shape (tokens,), and where the rows came from.

    ``counts`` says how many sequences each row is of, ``lengths`` how many tokens each of these has.
    """

    inputs: dict[str, Int[Tensor, "tokens"]]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    padding: dict[str, int]
    targets: Shaped[Tensor, "rows *each"] | None
    index: list[int]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        ends = [0, *accumulate(self.lengths)]
        places = [0, *accumulate(self.counts)]
        return tuple(ends[stop] - ends[start] for start, stop in pairwise(places))

    def padded(self) -> dict[str, Int[Tensor, "sequences width"]]:
        """The inputs padded to the longest sequence, with an attention mask, as transformers takes them."""
        step = torch.arange(max(self.lengths))
        mask = step < torch.tensor(self.lengths)[:, None]
        padded = {"attention_mask": mask.long()}
        for name, values in self.inputs.items():
            padded[name] = torch.full(mask.shape, self.padding[name]).masked_scatter_(mask, values)
        return padded


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows; ``truncated`` of them had a sequence of more than ``max_length`` tokens.

    The sequences of a row lie end to end in its columns; ``parts`` are their lengths.
    """

    columns: dict[str, list[list[int]]]
    parts: list[tuple[int, ...]]
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

    def take(self, index: Sequence[int]) -> "Tokens":
        """The rows at ``index``."""
        columns = {name: [column[i] for i in index] for name, column in self.columns.items()}
        labels = None if self.labels is None else tuple(self.labels[i] for i in index)
        return replace(self, columns=columns, parts=[self.parts[i] for i in index], labels=labels)

    def around_first(self, before: Sequence[int], after: Sequence[int]) -> "Tokens":
        """The same with tokens ``before`` and ``after`` the first one of every sequence; their other inputs are 0."""
        if not before and not after:
            return self

        def widened(name: str, row: list[int], lengths: tuple[int, ...]) -> list[int]:
            ends, found = [0, *accumulate(lengths)], list[int]()
            ahead, behind = (ids if name == "input_ids" else [0] * len(ids) for ids in (before, after))
            for start, stop in pairwise(ends):
                found += [*ahead, row[start], *behind, *row[start + 1 : stop]]
            return found

        columns = {
            name: [widened(name, *row) for row in zip(column, self.parts, strict=True)]
            for name, column in self.columns.items()
        }
        more = len(before) + len(after)
        return replace(self, columns=columns, parts=[tuple(n + more for n in lengths) for lengths in self.parts])

    def batch(self, index: list[int]) -> Batch:
        """The rows at ``index`` as one batch, its labels as the loss of the task's kind wants them."""
        inputs = {
            name: torch.tensor(list(chain.from_iterable(column[i] for i in index)))
            for name, column in self.columns.items()
        }
        parts = [self.parts[i] for i in index]
        lengths, counts = tuple(chain.from_iterable(parts)), tuple(map(len, parts))
        return Batch(inputs, lengths, counts, self.padding, self._targets(index), index)

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


class Epochs:
    """The training rows of every step: all rows once before any comes again, a function of (seed, step) alone."""

    def __init__(self, tokens: Tokens, batch_size: int, seed: int) -> None:
        """``steps`` of at most ``batch_size`` rows make an epoch."""
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.steps = -(-len(tokens) // batch_size)
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """The indices of the rows of ``step``, counted from the first epoch's first."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._latest[0]:  # an epoch is shuffled once, while its steps are asked for in turn
            self._latest = (epoch, self.tokens.shuffled(self.batch_size, self.seed, epoch))
        return self._latest[1][place]


def tokenise(rows: Rows, task: Task, tokenizer: Any, max_length: int, pad_token: int, apart: bool = False) -> Tokens:
    """Tokenise ``rows``; longer sequences are cut to ``max_length``, and their rows counted.

    The texts of a row are one sequence, a pair, or, with ``apart``, a sequence each. Raises DataError for more than
    two texts that are not ``apart``.

    Sequences are cut as by ``truncation="longest_first"``, on the side that the tokenizer names. Of each text only the
    first (or last) ``CHARACTERS * max_length`` characters are read. That changes no token if they hold at least
    ``max_length`` tokens without their last two words, which may be incomplete. Otherwise (long runs of white space,
    words of more than 100 characters that WordPiece reads as one unknown token) the row is what those characters
    give, and still counts as cut. If neither text of a pair fits, which one keeps the odd token depends on the
    characters read.

    Threads may share the tokenizer of an :class:`~mergekit_bert.encoder.load.Encoder`: it is not changed.
    """
    if len(task.text) > 2 and not apart:
        found = f"{len(task.text)} texts a row, to be read together"
        raise DataError(f"task {task.name!r}", found, "one or two", "use a `head` that reads texts apart")
    places = range(len(task.text) if apart else 1)
    encoded = [_sequences(_texts(rows, place, apart), tokenizer, max_length) for place in places]
    columns = {
        name: [list(chain.from_iterable(parts)) for parts in zip(*(found[name] for found, _ in encoded), strict=True)]
        for name in encoded[0][0]
    }
    parts = list(zip(*([len(ids) for ids in found["input_ids"]] for found, _ in encoded), strict=True))
    truncated = sum(map(any, zip(*(cut for _, cut in encoded), strict=True)))
    padding = {name: pad_token if name == "input_ids" else 0 for name in columns}
    return Tokens(columns, parts, rows.labels, truncated, padding, task)


def _texts(rows: Rows, place: int, apart: bool) -> Sequence[tuple[str, ...]]:
    """The texts of the sequence at ``place`` in every row."""
    return [(texts[place],) for texts in rows.texts] if apart else rows.texts


def _sequences(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """The columns of one sequence of every row, and which were cut."""
    most, right = CHARACTERS * max_length, tokenizer.truncation_side == "right"
    columns: dict[str, list[list[int]]] = {"input_ids": []}
    truncated: list[bool] = []
    for start in range(0, len(texts), _ROWS):
        whole = texts[start : start + _ROWS]
        read = [tuple(text[:most] if right else text[-most:] for text in row) for row in whole]
        part = _encode(tokenizer, read)
        for place, ids in enumerate(part["input_ids"]):
            truncated.append(len(ids) > max_length or read[place] != whole[place])
            if len(ids) > max_length:
                cut = _cut(tokenizer, part, place, read[place], max_length)
                for name, column in part.items():
                    column[place] = cut[name]
        for name, column in part.items():
            columns.setdefault(name, []).extend(column)
    return columns, truncated


def join(parts: Sequence[Tokens]) -> Tokens:
    """The unlabelled rows of several tasks, one after the other; their labels, and so their tasks, no longer count."""
    first = parts[0]
    columns = {name: [row for part in parts for row in part.columns[name]] for name in first.columns}
    sequences = [row for part in parts for row in part.parts]
    return Tokens(columns, sequences, None, sum(part.truncated for part in parts), first.padding, first.task)


def _encode(tokenizer: Any, texts: Sequence[Sequence[str]], **options: object) -> Any:
    """transformers' encoding of rows of texts; there is no attention mask, since rows are not padded here."""
    columns = map(list, zip(*texts, strict=True))
    return tokenizer(*columns, verbose=False, return_attention_mask=False, **options)


def _cut(tokenizer: Any, encoded: Any, place: int, texts: Sequence[str], max_length: int) -> dict[str, list[int]]:
    """The columns of the row at ``place``, cut to ``max_length``.

    A fast tokenizer keeps the truncation asked of it as state, which threads would share: it is never asked.
    """
    if not tokenizer.is_fast:
        again = _encode(tokenizer, [texts], truncation="longest_first", max_length=max_length)
        return {name: column[0] for name, column in again.items()}
    kept = _kept(encoded.sequence_ids(place), max_length, tokenizer.truncation_side == "right")
    return {name: [column[place][at] for at in kept] for name, column in encoded.items()}


def _kept(owners: Sequence[int | None], max_length: int, right: bool) -> list[int]:
    """The places that stay of a row longer than ``max_length``, as the tokenizers library has it ("longest_first").

    ``owners`` is the text (0 or 1) of each token; None for special tokens, which all stay. The shorter text stays
    whole if it fits into half of the room. Texts lose tokens on the right or on the left.
    """
    first, second = owners.count(0), owners.count(1)
    room = max(max_length - owners.count(None), 0)
    shorter = min(first, second, room // 2)
    keep = (shorter, room - shorter) if first <= second else (room - shorter, shorter)
    dropped = set[int]()
    for text, count in enumerate(keep):
        places = [place for place, owner in enumerate(owners) if owner == text]
        dropped.update(places[count:] if right else places[: len(places) - count])
    return [place for place in range(len(owners)) if place not in dropped]
