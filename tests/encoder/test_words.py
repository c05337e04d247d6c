"""The words of a tokenizer: whole ones only, whichever way its vocabulary marks them, in the order of their ids."""

import random
from dataclasses import dataclass

import pytest

from mergekit_bert.encoder.load import Encoder
from mergekit_bert.encoder.words import whole_words
from tests.tiny import WORDS


@dataclass(frozen=True)
class Vocabulary:
    """As much of a tokenizer as is read."""

    tokens: tuple[str, ...]

    def get_vocab(self) -> dict[str, int]:
        places = list(enumerate(self.tokens))
        random.Random(0).shuffle(places)  # a dictionary's order tells nothing
        return {token: place for place, token in places}


KINDS = {
    "WordPiece": (
        (
            "[PAD]",
            "[unused1]",
            "!",
            "(",
            "a",
            "b",
            "the",
            "##the",
            "##s",
            "of",
            "café",
            "1990",
            "can't",
            "Ġ",
            "▁",
            "of2",
        ),
        ["!", "a", "the", "of", "café"],
    ),
    "SentencePiece": (
        ("<s>", "</s>", "▁", ",", "▁the", "s", "ing", "▁a", "▁b", "▁I", "▁Straße", "the", "▁.", ".", "▁12", "▁▁x", "a"),
        [",", "the", "a", "I", "Straße", "."],
    ),
    "byte-level": (
        ("<s>", ".", "Ġthe", "the", "Ġ", "ing", "Ġa", "ĠThe", "ĠÐł", "ĠÑģÑĤ", "ĠcafÃł", "Ġ-", "-", "Ġx", "Ġof"),
        [".", "the", "a", "The", "-", "of"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_whole_each_once_and_in_order(kind: str) -> None:
    tokens, words = KINDS[kind]
    assert whole_words(Vocabulary(tokens)) == words


def test_no_words_are_found_where_there_are_none() -> None:
    assert whole_words(Vocabulary(("[PAD]", "##a", "1", "一"))) == []
    assert whole_words(Vocabulary(())) == []


def test_words_of_a_loaded_encoder(bert: Encoder) -> None:
    assert whole_words(bert.tokenizer) == list(WORDS)
