"""Tokenizer of the scenes: converts text to word ids and back."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import ConfigError, unknown_name
from .scene_questions import NUMBERS, PLURALS
from .scene_rendering import COLORS

PAD, END, IMAGE = "<pad>", "<end>", "<image>"
WORDS = (
    PAD, END, IMAGE, *COLORS, *PLURALS, *PLURALS.values(), *NUMBERS, "yes", "no", "parked", "moving", "describe",
    "what", "color", "is", "there", "a", "and", "the", "how", "many", "left", "right", "of", "above", "below",
)  # fmt: skip
"""id -> word."""
IDS = {word: number for number, word in enumerate(WORDS)}


def encode_text(text: str) -> list[int]:
    """Encodes a text as word ids; question marks and periods are ignored.

    Raises:
        ConfigError: no word, or an unknown word; the message lists the closest ones.

    Example:
        >>> [WORDS[number] for number in encode_text("The red car is parked.")]
        ['the', 'red', 'car', 'is', 'parked']
    """
    words = text.lower().replace("?", " ").replace(".", " ").split()
    if not words:
        raise ConfigError("scenes text", expected="at least one word", got=repr(text))
    for word in words:
        if word not in IDS:
            raise unknown_name("scenes text", "word", word, WORDS)
    return [IDS[word] for word in words]


def decode_text(ids: Iterable[int]) -> str:
    """Decodes ids up to the end token; padding and image tokens are skipped.

    Example:
        >>> decode_text([IDS["a"], IDS["car"], IDS[END], IDS["red"]])
        'a car'
    """
    words = []
    for number in ids:
        if WORDS[number] == END:
            break
        if WORDS[number] not in (PAD, IMAGE):
            words.append(WORDS[number])
    return " ".join(words)
