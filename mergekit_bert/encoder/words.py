"""The words of a tokenizer: those tokens of its vocabulary that are whole words, whatever the kind of the vocabulary.

Most vocabularies are ordered by how common a token is, so the words come with the most common ones near the front.
"""

from typing import Any

_STARTS = ("▁", "Ġ")
"""How SentencePiece and byte-level vocabularies mark a token that begins a word; WordPiece marks the others, by ##."""
_MARKED = 0.1
"""A vocabulary marks the beginnings of words if at least this share of its tokens has the mark."""
_PUNCTUATION = frozenset(".,?!'-")


def whole_words(tokenizer: Any) -> list[str]:
    """The words and usual punctuation marks in the vocabulary of ``tokenizer``, each once, in the order of their ids.

    A word is of letters alone, and of two at least, but for "a" and "i". Byte-level vocabularies spell other letters
    than ASCII in bytes, so only their ASCII words count.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    start = next((one for one in _STARTS if sum(token.startswith(one) for token in tokens) > _MARKED * len(tokens)), "")
    found = dict.fromkeys(
        word
        for token in tokens
        if _is_word(word := token.removeprefix(start))
        and (token.startswith(start) or word in _PUNCTUATION)
        and (start != "Ġ" or word.isascii())
    )
    return list(found)


def _is_word(text: str) -> bool:
    return text in _PUNCTUATION or (text.isalpha() and (len(text) > 1 or text in "aiAI"))
