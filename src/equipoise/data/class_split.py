"""Classes that are held out: neither trained nor tested, and unknown to the finished model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import ConfigError
from .dataset import Split


def sample_kept_classes(held_out: Sequence[int], count: int, who: str) -> Int[Tensor, " class"]:
    """The classes that are not held out, in their order.

    Args:
        held_out: numbers of classes; none leaves all.
        count: of all classes.
        who: begins the error's message.

    Raises:
        ConfigError: no list of classes, or fewer than two that remain.

    Example:
        >>> kept_classes([2, 0], 5, "Digits")
        tensor([1, 3, 4])
    """
    listed = isinstance(held_out, Sequence) and not isinstance(held_out, str)
    if not listed or not all(type(value) is int and 0 <= value < count for value in held_out):
        raise ConfigError(
            who, expected=f"held_out, a list of classes among 0 to {count - 1}", got=f"held_out = {held_out!r}",
            fix="Write it as held_out: [7, 8, 9].",
        )  # fmt: skip
    kept = [value for value in range(count) if value not in held_out]
    if len(kept) < 2:
        raise ConfigError(
            who, expected="two or more classes that are not held out", got=f"{len(kept)} of {count}",
            fix="Hold out fewer.",
        )  # fmt: skip
    return torch.tensor(kept)


def split_by_class(split: Split, kept: Int[Tensor, " class"]) -> tuple[Split, Split]:
    """The samples of the kept classes, with targets that count these from 0, and the others, with targets as they are.

    Args:
        split: with targets (sample,) of whole numbers.
        kept: (class,) in rising order.

    Example:
        >>> known, unknown = divided(Split({}, torch.tensor([3, 0, 9, 3])), torch.tensor([0, 3]))
        >>> known.target, unknown.target
        (tensor([1, 0, 1]), tensor([9]))
    """
    known = torch.isin(split.target, kept)
    inside, outside = _chosen(split, known), _chosen(split, ~known)
    return Split(inside.inputs, torch.searchsorted(kept, inside.target)), outside


def _chosen(split: Split, rows: Bool[Tensor, " sample"]) -> Split:
    return Split({name: values[rows] for name, values in split.inputs.items()}, split.target[rows])
