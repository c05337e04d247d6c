"""Invented texts: rows without labels for merges that learn or measure, where there is no data at all.

Such a merge asks the experts themselves what is right, so its texts need no labels, and they need not even be of the
task. What counts is that they lie where the adapters act: some like sentences, pairs of all degrees of likeness, and
words of every kind. They are made of the training texts of the sample corpus (of all its tasks, whatever the task),
of the same texts with words replaced, and of words drawn by Zipf's law from a vocabulary, the encoder's own.

They may fail where a task's texts are far from English sentences: another language, code, long documents. A few
hundred real texts serve better there.

Rows are the same on every machine, since all draws go through ``random.Random.random``, as in the sample corpus; and
fewer rows are the first of more.
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
"""A vocabulary of fewer words makes way for the words of the sample corpus."""

_ONE_SENTENCE, _TWO_SENTENCES = 0.4, 0.2
"""Shares of a single text's kinds; the rest are words at random."""
_SAMPLE_PAIR, _NOISY_COPY = 0.5, 0.25
"""Shares of a pair's kinds; the rest are words at random and an edited copy of them."""

_NOISE = (0.0, 0.2, 0.5)
"""How likely a word of a sentence is to be replaced: one of these for each row."""
_COPY_NOISE = (0.5, 0.8)
"""The same for the sentence that is copied, and the most for its copy."""

_SHORTEST, _LONGEST = 3, 27
"""Words of a text of words at random."""
_MOST_EDITED = 1.2
"""The share of words that an edited copy changes is drawn up to this; from 1 on it changes all."""
_REPLACED = 0.7
"""How many of the changed words are replaced; the others are dropped."""
_ROTATED = 0.3
"""How many of the copies begin in the middle and end with their beginning."""

_SPEECH, _RARE = 20.0, 500.0
"""The word at place ``i`` of the vocabulary weighs ``1 / (i + this)``: in texts of words at random, and as noise."""


def invent(task: Task, words: Sequence[str], count: int, seed: int = 0) -> Rows:
    """``count`` rows of texts without labels for ``task``, as many a row as it has columns.

    ``words`` are a vocabulary, the most common words first. Tasks of different names get different rows.
    """
    inventor = _Inventor(words if len(words) >= FEWEST_WORDS else _corpus_words(), Random(f"{task.name} {seed}"))
    return Rows(tuple(inventor.row(len(task.text)) for _ in range(count)), None, f"invented {task.name}")


@cache
def _corpus() -> tuple[tuple[str, ...], tuple[Pair, ...]]:
    """All sentences and all pairs of the sample corpus; its dev rows are left for scoring."""
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
        self.reach = list(accumulate(1 / (place + flat) for place in range(len(words))))

    def draw(self, rng: Random) -> str:
        """One word."""
        return self.words[bisect_left(self.reach, rng.random() * self.reach[-1])]


class _Inventor:
    """Writes one row after the other, all drawn from ``rng``."""

    def __init__(self, words: Sequence[str], rng: Random) -> None:
        self.speech, self.rare, self.rng = _Words(words, _SPEECH), _Words(words, _RARE), rng
        self.sentences, self.pairs = _corpus()

    def row(self, texts: int) -> tuple[str, ...]:
        """A text, a pair, or more texts that have nothing to do with each other."""
        return self.pair() if texts == 2 else tuple(text for _ in range(texts) for text in self.single())

    def single(self) -> tuple[str]:
        """A sentence, two of them, or words at random."""
        noise, kind = self.pick(_NOISE), self.rng.random()
        if kind < _ONE_SENTENCE:
            return (self.noisy(self.pick(self.sentences), noise),)
        if kind < _ONE_SENTENCE + _TWO_SENTENCES:
            return (self.noisy(f"{self.pick(self.sentences)} {self.pick(self.sentences)}", noise),)
        return (" ".join(self.words()),)

    def pair(self) -> Pair:
        """A pair of the sample, a sentence and its noisy copy, or words at random and their edited copy."""
        noise, kind = self.pick(_NOISE), self.rng.random()
        if kind < _SAMPLE_PAIR:
            one, two = self.pick(self.pairs)
            return self.noisy(one, noise), self.noisy(two, noise)
        if kind < _SAMPLE_PAIR + _NOISY_COPY:
            original, most = _COPY_NOISE
            text = self.noisy(self.pick(self.sentences), original)
            return text, self.noisy(text, self.rng.random() * most)
        words = self.words()
        return " ".join(words), " ".join(self.edited(words))

    def words(self) -> list[str]:
        """Words at random."""
        count = _SHORTEST + int(self.rng.random() * (_LONGEST - _SHORTEST + 1))
        return [self.speech.draw(self.rng) for _ in range(count)]

    def noisy(self, text: str, share: float) -> str:
        """``text`` with that share of its words replaced."""
        return " ".join(self.rare.draw(self.rng) if self.chance(share) else word for word in text.split())

    def edited(self, words: list[str]) -> list[str]:
        """A copy with words replaced or dropped, in some cases rotated; at least one word is left."""
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
        """Whether something of this probability happens."""
        return self.rng.random() < probability
