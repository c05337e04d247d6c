"""Synthetic texts: unlabelled rows for merges that learn or measure, if there is no data at all.

Such a merge takes the experts' answers as targets, so its texts need no labels and need not belong to the task. They
only have to activate the adapters: sentences, pairs from identical to unrelated, and words of every kind. They are
sentences and pairs from the training split of the sample corpus (from all its tasks, whatever the task), the same
with words replaced, and words drawn by Zipf's law from the encoder's vocabulary.

They may fail for tasks whose texts are far from English sentences: another language, code, long documents. A few
hundred real texts work better there.

Rows are the same on every machine, since all draws go through ``random.Random.random``, as in the sample corpus. The
first rows do not depend on how many are drawn.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from random import Random
from typing import TypeAlias, TypeVar

from mergekit_bert.data.rows import Rows
from mergekit_bert.data.sample import SAMPLE_TASKS, generate
from mergekit_bert.data.task import Task

T = TypeVar("T")
Pair: TypeAlias = tuple[str, str]

FEWEST_WORDS = 50
"""A smaller vocabulary is replaced by the words of the sample corpus."""

_ONE_SENTENCE, _TWO_SENTENCES = 0.4, 0.2
"""Shares of each kind of single text; the rest are random words."""
_SAMPLE_PAIR, _NOISY_COPY = 0.5, 0.25
"""Shares of each kind of pair; the rest are random words and an edited copy of them."""

_NOISE = (0.0, 0.2, 0.5)
"""Probability of replacing a word of a sentence; each row draws one of these."""
_COPY_NOISE = (0.5, 0.8)
"""The same for the sentence that is copied, and the maximum for its copy."""

_SHORTEST, _LONGEST = 3, 27
"""Number of words in a text of random words."""
_MOST_EDITED = 1.2
"""An edited copy draws the share of words that it changes from 0 to this; from 1 on it changes all."""
_REPLACED = 0.7
"""Share of the changed words that are replaced; the others are dropped."""
_ROTATED = 0.3
"""Share of the copies that are rotated: the end comes before the beginning."""

_SPEECH, _RARE = 20.0, 500.0
"""The word at position ``i`` of the vocabulary has weight ``1 / (i + this)``: in random words, and as noise."""


def synthetic_rows(task: Task, words: Sequence[str], count: int, seed: int = 0) -> Rows:
    """``count`` unlabelled rows for ``task``, with as many texts per row as it has text columns.

    ``words`` is a vocabulary, the most common words first. Tasks with different names get different rows.
    """
    generator = _Generator(words if len(words) >= FEWEST_WORDS else _corpus_words(), Random(f"{task.name} {seed}"))
    return Rows(tuple(generator.row(len(task.text)) for _ in range(count)), None, f"synthetic {task.name}")


@cache
def _corpus() -> tuple[tuple[str, ...], tuple[Pair, ...]]:
    """All sentences and all pairs of the training split of the sample corpus; its dev rows are for scoring."""
    rows = [texts for task in SAMPLE_TASKS for texts, _ in generate(task, "train")]
    pairs = tuple((texts[0], texts[1]) for texts in rows if len(texts) == 2)
    return tuple(text for texts in rows for text in texts), pairs


def _corpus_words() -> list[str]:
    """The words of the sample corpus, the most common first."""
    counts = Counter(word for text in _corpus()[0] for word in text.lower().rstrip(".?").replace(",", " ,").split())
    return [word for word, _ in counts.most_common()]


class _Words:
    """A vocabulary from which words are drawn by Zipf's law, flattened at its head."""

    def __init__(self, words: Sequence[str], flat: float) -> None:
        self.words = words
        self.cumulative = list(accumulate(1 / (place + flat) for place in range(len(words))))

    def draw(self, rng: Random) -> str:
        """One word."""
        return self.words[bisect_left(self.cumulative, rng.random() * self.cumulative[-1])]


class _Generator:
    """Generates rows, all drawn from ``rng``."""

    def __init__(self, words: Sequence[str], rng: Random) -> None:
        self.speech, self.rare, self.rng = _Words(words, _SPEECH), _Words(words, _RARE), rng
        self.sentences, self.pairs = _corpus()

    def row(self, texts: int) -> tuple[str, ...]:
        """A text, a pair, or more texts that have nothing to do with each other."""
        return self.pair() if texts == 2 else tuple(text for _ in range(texts) for text in self.single())

    def single(self) -> tuple[str]:
        """A sentence, two of them, or random words."""
        noise, kind = self.pick(_NOISE), self.rng.random()
        if kind < _ONE_SENTENCE:
            return (self.noisy(self.pick(self.sentences), noise),)
        if kind < _ONE_SENTENCE + _TWO_SENTENCES:
            return (self.noisy(f"{self.pick(self.sentences)} {self.pick(self.sentences)}", noise),)
        return (" ".join(self.words()),)

    def pair(self) -> Pair:
        """A pair of the sample corpus, a sentence and its noisy copy, or random words and their edited copy."""
        noise, kind = self.pick(_NOISE), self.rng.random()
        if kind < _SAMPLE_PAIR:
            first, second = self.pick(self.pairs)
            return self.noisy(first, noise), self.noisy(second, noise)
        if kind < _SAMPLE_PAIR + _NOISY_COPY:
            original, most = _COPY_NOISE
            text = self.noisy(self.pick(self.sentences), original)
            return text, self.noisy(text, self.rng.random() * most)
        words = self.words()
        return " ".join(words), " ".join(self.edited(words))

    def words(self) -> list[str]:
        """Random words."""
        count = _SHORTEST + int(self.rng.random() * (_LONGEST - _SHORTEST + 1))
        return [self.speech.draw(self.rng) for _ in range(count)]

    def noisy(self, text: str, share: float) -> str:
        """``text`` with that share of its words replaced."""
        return " ".join(self.rare.draw(self.rng) if self.chance(share) else word for word in text.split())

    def edited(self, words: list[str]) -> list[str]:
        """A copy with words replaced or dropped, sometimes rotated; at least one word is left."""
        share, copy = self.rng.random() * _MOST_EDITED, list[str]()
        for word in words:
            if not self.chance(share):
                copy.append(word)
            elif self.chance(_REPLACED):
                copy.append(self.speech.draw(self.rng))
        if self.chance(_ROTATED):
            start = int(self.rng.random() * (len(copy) + 1))
            copy = copy[start:] + copy[:start]
        return copy or words[:1]

    def pick(self, items: Sequence[T]) -> T:
        """One item."""
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability
