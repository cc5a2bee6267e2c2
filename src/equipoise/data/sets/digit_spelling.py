"""Written forms of the digits as letter ids, and random misspelling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError
from ..counter_rng import CounterRNG

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
"""The letter at position i has id i + 1; 0 is padding."""
FORMS = {
    "english": "zero one two three four five six seven eight nine",
    "french": "zero un deux trois quatre cinq six sept huit neuf",
    "german": "null eins zwei drei vier fuenf sechs sieben acht neun",
    "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "roman": "nulla i ii iii iv v vi vii viii ix",
    "figure": "0 1 2 3 4 5 6 7 8 9",
}
"""Form -> the digits 0 to 9 in it."""
LONGEST = 6


def letter_ids(words: Sequence[str], length: int = LONGEST) -> Int[Tensor, "word length"]:
    """Encodes words as letter ids, padded with 0.

    Raises:
        ConfigError: a word longer than ``length``, or a letter that is not in ``LETTERS``.

    Example:
        >>> letter_ids(["cab", "9"], length=4)
        tensor([[ 3,  1,  2,  0],
                [36,  0,  0,  0]])
    """
    ids = torch.zeros(len(words), length, dtype=torch.long)
    for row, word in enumerate(words):
        if len(word) > length or any(letter not in LETTERS for letter in word):
            raise ConfigError("letter_ids", expected=f"at most {length} letters of '{LETTERS}'", got=repr(word))
        ids[row, : len(word)] = torch.tensor([LETTERS.index(letter) + 1 for letter in word], dtype=torch.long)
    return ids


def spelled_digits() -> Int[Tensor, "digit form length"]:
    """Returns the letter ids of every digit in every form."""
    return torch.stack([letter_ids(words.split()) for words in FORMS.values()], dim=1)


def one_hot(ids: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch length letter"]:
    """One-hot encodes letter ids; padding becomes zeros.

    Example:
        >>> one_hot(letter_ids(["ad"], length=3))[0, :, :4]
        tensor([[1., 0., 0., 0.],
                [0., 0., 0., 1.],
                [0., 0., 0., 0.]])
    """
    return torch.nn.functional.one_hot(ids, len(LETTERS) + 1)[..., 1:].float()


def misspell(ids: Int[Tensor, "batch length"], slips: float, draw: CounterRNG) -> Int[Tensor, "batch length"]:
    """Misspells words: each letter may be replaced, dropped or swapped with the next one, with equal probability.

    Args:
        ids: (batch, length) letter ids, 0 = padding at the end.
        slips: probability of an error per letter, in [0, 1].
        draw: random numbers of the batch.

    Returns:
        Letter ids of the same shape. The first letter is never dropped, so that no word becomes empty.

    Example:
        >>> word = letter_ids(["seven"])
        >>> torch.equal(misspell(word, 0.0, CounterRNG(0, 0, torch.tensor([0]))), word)
        True
    """
    length = ids.shape[1]
    uniform, position = draw.uniform("slips", length), torch.arange(length)
    substitute = 1 + (draw.uniform("letters", length) * len(LETTERS)).long()
    third, letter = slips / 3, ids > 0
    replaced = torch.where(letter & (uniform < third), substitute, ids)
    dropped = letter & (uniform >= third) & (uniform < 2 * third) & (position > 0)
    swapped = letter & (uniform >= 2 * third) & (uniform < slips)
    # Sort by position: swapped letters move behind the next one, dropped ones become padding at the end.
    rank: Float[Tensor, "batch length"] = (position + 1.5 * swapped).masked_fill(dropped | ~letter, math.inf)
    return replaced.masked_fill(dropped, 0).gather(1, rank.argsort(dim=1, stable=True))
