"""Held-out classes, excluded from training and testing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import ConfigError
from .dataset import Split


def sample_kept_classes(held_out: Sequence[int], count: int, who: str) -> Int[Tensor, " class"]:
    """Returns the classes that are not held out, in ascending order.

    Args:
        held_out: indices of the held-out classes; may be empty.
        count: total number of classes.
        who: start of the error message.

    Raises:
        ConfigError: ``held_out`` is not a list of classes, or fewer than two classes remain.

    Example:
        >>> sample_kept_classes([2, 0], 5, "Digits")
        tensor([1, 3, 4])
    """
    listed = isinstance(held_out, Sequence) and not isinstance(held_out, str)
    if not listed or not all(type(value) is int and 0 <= value < count for value in held_out):
        raise ConfigError(
            who, expected=f"held_out, a list of classes among 0 to {count - 1}", got=f"held_out = {held_out!r}",
            fix="Write it as held_out: [7, 8, 9].",
        )  # fmt: skip
    retained = [value for value in range(count) if value not in held_out]
    if len(retained) < 2:
        raise ConfigError(
            who, expected="two or more classes that are not held out", got=f"{len(retained)} of {count}",
            fix="Hold out fewer.",
        )  # fmt: skip
    return torch.tensor(retained)


def split_by_class(split: Split, retained: Int[Tensor, " class"]) -> tuple[Split, Split]:
    """Splits samples into those of the retained classes, relabeled from 0, and the others, with unchanged targets.

    Args:
        split: with integer targets (sample,).
        retained: (class,) in ascending order.

    Example:
        >>> known, unknown = split_by_class(Split({}, torch.tensor([3, 0, 9, 3])), torch.tensor([0, 3]))
        >>> known.target, unknown.target
        (tensor([1, 0, 1]), tensor([9]))
    """
    is_retained = torch.isin(split.target, retained)
    inside, outside = _select_rows(split, is_retained), _select_rows(split, ~is_retained)
    return Split(inside.inputs, torch.searchsorted(retained, inside.target), groups=inside.groups), outside


def _select_rows(split: Split, rows: Bool[Tensor, " sample"]) -> Split:
    groups = None if split.groups is None else [split.groups[row] for row in rows.nonzero()[:, 0].tolist()]
    return Split({name: values[rows] for name, values in split.inputs.items()}, split.target[rows], groups=groups)
