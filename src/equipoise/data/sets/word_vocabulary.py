"""Vocabulary of words, with letter trigrams for unknown words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name

PADDING = 0


class WordVocabulary:
    """Vocabulary of the words of some captions, in alphabetical order; a function of the captions alone.

    Id 0 is padding; word ids and then the ids of letter trigrams follow. Trigrams include markers at both word ends.

    Args:
        captions: texts whose words form the vocabulary.
        length: largest number of ids of a text.

    Raises:
        ConfigError: a length below 1, or captions without any word.

    Example:
        >>> words = WordVocabulary(["red heart", "blue book"], length=5)
        >>> words.encode(["Red book!"])
        tensor([[4, 2, 0, 0, 0]])
        >>> words.unseen("two red hearts")
        ['two', 'hearts']
    """

    def __init__(self, captions: Iterable[str], *, length: int) -> None:
        if length < 1:
            raise ConfigError("Words", expected="length >= 1", got=f"{length}")
        words = sorted({word for caption in captions for word in split_words(caption)})
        if not words:
            raise ConfigError("Words", expected="captions with words in them", got="none")
        pieces = sorted({piece for word in words for piece in trigrams(word)})
        self.length = length
        self.words = {word: number for number, word in enumerate(words, start=1)}
        self.pieces = {piece: number for number, piece in enumerate(pieces, start=len(words) + 1)}

    def __len__(self) -> int:
        return 1 + len(self.words) + len(self.pieces)

    def unseen(self, text: str) -> list[str]:
        """Returns the words of a text that are not in the vocabulary."""
        return [word for word in split_words(text) if word not in self.words]

    def spelled(self, word: str) -> list[int]:
        """Encodes a word by the ids of its known trigrams."""
        return [self.pieces[piece] for piece in trigrams(word) if piece in self.pieces]

    def numbers(self, text: str) -> list[list[int]]:
        """Encodes each word: one id, or those of its trigrams if the word is unknown."""
        return [[self.words[word]] if word in self.words else self.spelled(word) for word in split_words(text)]

    def encode(
        self, texts: Sequence[str], who: str = "Words", *, length: int | None = None
    ) -> Int[Tensor, "text length"]:
        """Encodes texts as rows of ids, padded with 0 to ``length``, by default that of the vocabulary.

        Raises:
            ShapeError: a text is empty or longer than ``length``.
            ConfigError: a text has neither a known word nor a known trigram.
        """
        length = self.length if length is None else length
        rows = [self._checked(text, index, [n for word in self.numbers(text) for n in word], who, length)
                for index, text in enumerate(texts)]  # fmt: skip
        return pad_sequences(rows, length)

    def _checked(self, text: str, index: int, row: list[int], who: str, length: int) -> list[int]:
        where = who if index == 0 else f"{who}, text {index}"
        if not split_words(text):
            raise ShapeError(where, expected="a text with a word in it", got=repr(text), fix="Say what is meant.")
        if not row:
            word = split_words(text)[0]
            raise unknown_name(where, "word", text, self.words, like=word)
        if len(row) > length:
            raise ShapeError(
                where, expected=f"a text of at most {length} words",
                got=f"{len(row)} ('{text[:40]}{'...' if len(text) > 40 else ''}')",
                fix="Shorten it; a word that is not known counts one for each of its letters.",
            )  # fmt: skip
        return row


def pad_sequences(rows: Sequence[Sequence[int]], length: int) -> Int[Tensor, "row length"]:
    """Truncates rows of ids to a length and pads them with 0.

    Example:
        >>> pad_sequences([[5, 7], [3, 4, 6, 8]], 3)
        tensor([[5, 7, 0],
                [3, 4, 6]])
    """
    return torch.tensor([[*row[:length], *[PADDING] * (length - len(row))] for row in rows]).reshape(-1, length)


def split_words(text: str) -> list[str]:
    """Splits a text into lower-case words, without punctuation.

    Example:
        >>> split_words("Kiss: WOMAN, man")
        ['kiss', 'woman', 'man']
    """
    return re.findall(r"\w+", text.casefold())


def trigrams(word: str) -> list[str]:
    """Returns the letter trigrams of a word, with markers at both ends.

    Example:
        >>> trigrams("red")
        ['<re', 'red', 'ed>']
    """
    marked = f"<{word}>"
    return [marked[start : start + 3] for start in range(len(marked) - 2)]
