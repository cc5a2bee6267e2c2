"""Joins the inputs of several questions to one batch, and splits rows into batches that can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inspection.prompt_inputs import Inputs

SEQUENCES = ("decoder_input_ids", "input_ids")
"""Inputs whose length is that of a text; masks and types of the decoder have names that begin with "decoder_"."""


def join_inputs(rows: Sequence[Inputs], padding: int, *, left: bool = False) -> Inputs:
    """Joins inputs of single samples with equal ``layout`` to one batch.

    Token ids, masks and token types are padded to one length, on the left for ``generate``, else on the right, where
    padding has no influence on earlier tokens of a causal model. Media are concatenated in the order of the rows.

    Args:
        rows: inputs of single samples.
        padding: id of padding tokens.
        left: the side of the padding.
    """
    if len(rows) == 1:
        return rows[0]
    batch: Inputs = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        if _is_sequence(name, rows[0]):
            fill = padding if name in SEQUENCES else 0
            longest = max(one.shape[1] for one in values)
            batch[name] = torch.cat([_padded(one, longest, fill, left) for one in values])
        elif isinstance(value, Tensor) and value.ndim:
            batch[name] = torch.cat(values)
        else:
            batch[name] = value
    return batch


def layout(inputs: Inputs) -> tuple[Any, ...]:
    """Returns what samples need in common to be joined: inputs, and sizes except text length and number of images."""
    parts = []
    for name, value in sorted(inputs.items()):
        if _is_sequence(name, inputs):
            parts.append((name, "sequence", tuple(value.shape[2:])))
        elif isinstance(value, Tensor) and value.ndim:
            parts.append((name, tuple(value.shape[1:]), value.dtype))
        else:
            parts.append((name, repr(value)))
    return tuple(parts)


def equal_groups(keys: Sequence[Any], size: int) -> list[list[int]]:
    """Returns groups of at most ``size`` indices with equal keys, in order.

    Example:
        >>> equal_groups(["a", "b", "a", "a"], 2)
        [[0, 2], [1], [3]]
    """
    groups: list[list[int]] = []
    open_groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        group = open_groups.get(key)
        if group is None or len(group) == size:
            group = open_groups[key] = []
            groups.append(group)
        group.append(index)
    return groups


def _is_sequence(name: str, inputs: Inputs) -> bool:
    """Whether an input has one entry for each token of a text."""
    value, ids = inputs[name], inputs.get(SEQUENCES[0] if name.startswith("decoder_") else SEQUENCES[1])
    return isinstance(value, Tensor) and ids is not None and value.ndim >= 2 and value.shape[:2] == ids.shape


def _padded(value: Tensor, length: int, fill: int, left: bool) -> Tensor:
    missing = length - value.shape[1]
    sides = (missing, 0) if left else (0, missing)
    return F.pad(value, (*(0, 0) * (value.ndim - 2), *sides), value=fill)
