"""Pairs of modalities: those that are trained, and the untrained one that is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ...errors import ConfigError, unknown_name

Pair = tuple[str, str]


def unordered_pairs(names: Sequence[str]) -> list[Pair]:
    """All unordered pairs of modalities, in the order of the names."""
    return list(combinations(names, 2))


def checked_pairs(pairs: Sequence[Sequence[str]], names: Sequence[str]) -> list[Pair]:
    """Validates the pairs of a recipe; returns each in the order of the names.

    Raises:
        ConfigError: no pairs, an entry that is not a pair of two modalities, or a duplicate.

    Example:
        >>> checked_pairs([["text", "audio"]], ("audio", "image", "text"))
        [('audio', 'text')]
    """
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise ConfigError(
            "CrossModalMatcher pairs", expected="one or more pairs, as [[audio, image], [image, text]]", got=repr(pairs)
        )
    result = [_pair(pair, names) for pair in pairs]
    if len(set(result)) < len(result):
        raise ConfigError("CrossModalMatcher pairs", expected="each pair once", got=repr(pairs))
    return result


def transfer_pair(pairs: Sequence[Pair], transfer: Sequence[str] | None, names: Sequence[str]) -> Pair:
    """The pair whose transfer is evaluated: ``transfer``, or the first untrained pair.

    Raises:
        ConfigError: ``transfer`` is not a pair, or is None although all pairs are trained.
    """
    if transfer is not None:
        return _pair(transfer, names)
    rest = [pair for pair in unordered_pairs(names) if pair not in pairs]
    if not rest:
        raise ConfigError(
            "CrossModalMatcher transfer", expected="the pair to evaluate, since all are trained", got="None",
            fix=f"Set transfer: [{names[0]}, {names[-1]}].",
        )  # fmt: skip
    return rest[0]


def _pair(pair: Sequence[str], names: Sequence[str]) -> Pair:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == pair[1]:
        raise ConfigError("CrossModalMatcher", expected="two modalities as a pair", got=repr(pair))
    for name in pair:
        if name not in names:
            raise unknown_name("CrossModalMatcher", "modality", str(name), names)
    first, second = sorted(pair, key=list(names).index)
    return first, second
