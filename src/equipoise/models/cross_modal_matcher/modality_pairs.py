"""Which pairs of modalities are trained, and which one is judged without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ...errors import ConfigError, unknown_name

Pair = tuple[str, str]


def unordered_pairs(names: Sequence[str]) -> list[Pair]:
    """All pairs of modalities, each once, in the order of the names."""
    return list(combinations(names, 2))


def checked_pairs(pairs: Sequence[Sequence[str]], names: Sequence[str]) -> list[Pair]:
    """Pairs as a recipe lists them, in the order of the names.

    Raises:
        ConfigError: none, one that is no pair of two modalities, one that stands there twice.

    Example:
        >>> checked_pairs([["text", "audio"]], ("audio", "image", "text"))
        [('audio', 'text')]
    """
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise ConfigError(
            "Correspondence pairs", expected="one or more pairs, as [[audio, image], [image, text]]", got=repr(pairs)
        )
    found = [_pair(pair, names) for pair in pairs]
    if len(set(found)) < len(found):
        raise ConfigError("Correspondence pairs", expected="each pair once", got=repr(pairs))
    return found


def untrained_pairs(pairs: Sequence[Pair], transfer: Sequence[str] | None, names: Sequence[str]) -> Pair:
    """The pair that is judged: ``transfer``, or else the first that is not trained.

    Raises:
        ConfigError: no pair, or none given where all are trained.
    """
    if transfer is not None:
        return _pair(transfer, names)
    rest = [pair for pair in unordered_pairs(names) if pair not in pairs]
    if not rest:
        raise ConfigError(
            "Correspondence transfer", expected="the pair to judge, where all are trained", got="None",
            fix=f"Write transfer: [{names[0]}, {names[-1]}].",
        )  # fmt: skip
    return rest[0]


def _pair(pair: Sequence[str], names: Sequence[str]) -> Pair:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == pair[1]:
        raise ConfigError("Correspondence", expected="two modalities as a pair", got=repr(pair))
    for name in pair:
        if name not in names:
            raise unknown_name("Correspondence", "modality", str(name), names)
    first, second = sorted(pair, key=list(names).index)
    return first, second
