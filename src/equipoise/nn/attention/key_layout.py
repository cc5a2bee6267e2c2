"""Layout of the keys by modality, divided into few long runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .sdpa_kernels import Bias

SHORTEST_RUN = 32
"""Mean run length below which another algorithm is cheaper for causal attention over interleaved modalities."""

SAMPLE_WORK = 2**23
"""Multiplications (head x query x key x dim) above which a separate kernel call per sample pays off."""

GRAIN = 16
"""Block size of the CPU kernel in keys. Runs that end elsewhere take up to a third more time."""

MOST_STRAYS = 32
"""Maximum number of keys handled explicitly so that runs end at block boundaries."""


class Run(NamedTuple):
    """Consecutive keys of one modality."""

    start: int
    stop: int
    label: int


class BorderKeys(NamedTuple):
    """Keys at modality borders that are processed in the adjacent run, so that runs end at block boundaries.

    The output does not depend on the run boundaries; the shares of these keys are corrected afterward.

    Attributes:
        keys: indices of the keys.
        visited: label of the run in which each key is processed.
        modality: label of each key.
    """

    keys: Int[Tensor, " stray"]
    visited: Int[Tensor, " stray"]
    modality: Int[Tensor, " stray"]


class Group(NamedTuple):
    """Samples with the same key layout.

    Attributes:
        samples: slice of the batch.
        order: permutation that sorts the keys by `runs`; None if they are sorted.
        runs: segments that cover all keys.
        strays: keys processed in the run of another modality; None if there are none.
    """

    samples: slice
    order: Int[Tensor, " key"] | None
    runs: tuple[Run, ...]
    strays: BorderKeys | None


def plan_segments(
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"],
    bias: Bias | None,
    *,
    is_causal: bool,
    sample_work: int,
    grain: int = 1,
) -> list[Group] | None:
    """Plans the segments of each group of samples; None if segments would be slower than two passes.

    Labels of masked keys are ignored, so samples padded to different lengths can form one group.
    """
    rows = modality if modality.ndim == 2 else modality[None]
    shared = _shared_layout(rows, bias)
    if shared is not None:
        groups = [_group(slice(None), shared, is_causal, grain)]
    elif sample_work < SAMPLE_WORK:
        return None
    else:
        groups = [_group(slice(i, i + 1), row, is_causal, grain) for i, row in enumerate(rows)]
    runs = sum(len(group.runs) for group in groups)
    return groups if not is_causal or runs * SHORTEST_RUN <= rows.numel() or runs <= 2 else None


def _shared_layout(rows: Int[Tensor, "batch key"], bias: Bias | None) -> Int[Tensor, " key"] | None:
    """Returns the layout that matches the visible keys of all samples, or None."""
    if len(rows) == 1:
        return rows[0]
    if bias is None or bias.shape[1] != 1 or bias.shape[2] != 1:
        return rows[0] if bool((rows == rows[0]).all()) else None
    visible = (bias[:, 0, 0] != -math.inf).to(rows.device).expand_as(rows)
    layout = rows.masked_fill(~visible, rows.min() - 1).amax(0)
    return layout.clamp(min=-1) if bool(((rows == layout) | ~visible).all()) else None


def _group(samples: slice, row: Int[Tensor, " key"], is_causal: bool, grain: int) -> Group:
    labels, lengths = torch.unique_consecutive(row, return_counts=True)
    order = None
    # Keys may be reordered unless attention is causal.
    if not is_causal and len(labels) > len(labels.unique()):
        row, order = torch.sort(row, stable=True)
        labels, lengths = torch.unique_consecutive(row, return_counts=True)
    stops, strays = lengths.cumsum(0), None
    if grain > 1:
        rounded = ((stops + grain // 2) // grain * grain).clamp(max=len(row))
        rounded[-1] = len(row)
        visited = labels.repeat_interleave(rounded.diff(prepend=rounded.new_zeros(1)))
        keys = (visited != row).nonzero().flatten()
        if len(keys) <= MOST_STRAYS:
            stops = rounded
            strays = BorderKeys(keys, visited[keys], row[keys]) if len(keys) else None
    bounds = [0, *stops.tolist()]
    runs = zip(bounds[:-1], bounds[1:], labels.tolist(), strict=True)
    return Group(samples, order, tuple(Run(*run) for run in runs if run[0] < run[1]), strays)


def modality_one_hot(
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"], num_modalities: int, like: Tensor
) -> Float[Tensor, "#batch 1 key modality"]:
    """Converts labels to one-hot columns; rows of special keys are zero."""
    columns = torch.arange(num_modalities, device=like.device)
    hot = (modality.to(like.device)[..., None] == columns).to(like.dtype)
    return hot[:, None] if hot.ndim == 3 else hot[None, None]
