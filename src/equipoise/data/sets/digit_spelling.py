"""Digits as they are written, in several forms, as letter ids; and slips of the pen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError
from ..counter_rng import CounterRNG

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
"""The letter at place i has the id i + 1; 0 is padding."""
FORMS = {
    "english": "zero one two three four five six seven eight nine",
    "french": "zero un deux trois quatre cinq six sept huit neuf",
    "german": "null eins zwei drei vier fuenf sechs sieben acht neun",
    "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "roman": "nulla i ii iii iv v vi vii viii ix",
    "figure": "0 1 2 3 4 5 6 7 8 9",
}
"""How the digits 0 to 9 are written."""
LONGEST = 6


def letter_ids(words: Sequence[str], length: int = LONGEST) -> Int[Tensor, "word length"]:
    """Words as ids of their letters, padded with 0.

    Raises:
        ConfigError: a word that is longer, or a letter that is not in ``LETTERS``.

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
    """Every digit in every form."""
    return torch.stack([letter_ids(words.split()) for words in FORMS.values()], dim=1)


def one_hot(ids: Int[Tensor, "*batch length"]) -> Float[Tensor, "*batch length letter"]:
    """A row for each place, with a 1 for its letter; padding is zeros.

    Example:
        >>> one_hot(letter_ids(["ad"], length=3))[0, :, :4]
        tensor([[1., 0., 0., 0.],
                [0., 0., 0., 1.],
                [0., 0., 0., 0.]])
    """
    return torch.nn.functional.one_hot(ids, len(LETTERS) + 1)[..., 1:].float()


def misspell(ids: Int[Tensor, "batch length"], slips: float, draw: CounterRNG) -> Int[Tensor, "batch length"]:
    """Words with slips: a letter becomes another one, is left out, or changes places with the next, equally likely.

    Args:
        ids: (batch, length) letter ids, 0 = padding at the end.
        slips: probability for each letter, in [0, 1].
        draw: the batch's random numbers.

    Returns:
        the same shape; the first letter is never left out, so that no word vanishes.

    Example:
        >>> word = letter_ids(["seven"])
        >>> torch.equal(misspell(word, 0.0, CounterRNG(0, 0, torch.tensor([0]))), word)
        True
    """
    length = ids.shape[1]
    dice, place = draw.uniform("slips", length), torch.arange(length)
    other = 1 + (draw.uniform("letters", length) * len(LETTERS)).long()
    third, letter = slips / 3, ids > 0
    changed = torch.where(letter & (dice < third), other, ids)
    lost = letter & (dice >= third) & (dice < 2 * third) & (place > 0)
    late = letter & (dice >= 2 * third) & (dice < slips)
    # A letter that comes late stands behind the next one; what is lost makes room at the end.
    rank: Float[Tensor, "batch length"] = (place + 1.5 * late).masked_fill(lost | ~letter, math.inf)
    return changed.masked_fill(lost, 0).gather(1, rank.argsort(dim=1, stable=True))
