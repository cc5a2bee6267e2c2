"""Corruptions of the order and presence of frames: frozen, shifted, shuffled and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from .input_frames import InputFrames

PACKETS = 20
"""Number of packets of a sample."""


def frozen(frames: InputFrames, level: float) -> Tensor:
    """Repeats the first frame of a contiguous part of each sample until its end; level is the extent of the part."""
    span = frames.region(level).reshape(*frames.size, -1)[..., 0]
    first = span.long().argmax(dim=1)
    source = torch.where(span, first[:, None], frames.position)
    return _take(frames.values, source)


def shift(frames: InputFrames, level: float) -> Tensor:
    """Moves the content by a fraction of the frames, earlier or later at random; vacated frames are 0.

    Images are moved in both directions.
    """
    moved = _move(frames, frames.values, frames.count, level)
    if frames.kind == "image":
        across = moved.movedim(-1, 1)
        width = torch.full_like(frames.count, across.shape[1])
        moved = _move(frames, across, width, level).movedim(1, -1)
    return moved


def shuffled(frames: InputFrames, level: float) -> Tensor:
    """Permutes a random subset of the frames; level is the fraction of the frames."""
    chosen = frames.chosen(level)
    drawn = frames.uniform(*frames.size)
    # The positions of the chosen frames in a random order, then those of the others.
    mixed = torch.where(chosen, drawn, 2.0).argsort(dim=1, stable=True)
    rank = (chosen.cumsum(dim=1) - 1).clamp(min=0)
    source = torch.where(chosen, mixed.gather(1, rank), frames.position)
    return _take(frames.values, source)


def dropped(frames: InputFrames, level: float) -> Tensor:
    """Sets packets of consecutive frames to 0, each with probability ``level``; a sample has at most 20 packets."""
    length = (frames.count / PACKETS).ceil().clamp(min=1).long()[:, None]
    packet = (frames.position // length).clamp(max=PACKETS - 1)
    lost = frames.uniform(frames.size[0], PACKETS) < level
    return frames.values.masked_fill(frames.expand(lost.gather(1, packet.expand(frames.size))), 0)


def _move(frames: InputFrames, values: Tensor, count: Tensor, level: float) -> Tensor:
    sign = 1 - 2 * (frames.uniform(len(count)) < 0.5).long()
    offset = (sign * (level * count).ceil().long())[:, None]
    source = torch.arange(values.shape[1], device=values.device)[None] - offset
    inside = (source >= 0) & (source < count[:, None])
    taken = _take(values, source.clamp(0, values.shape[1] - 1))
    return taken.masked_fill(~inside.reshape(*inside.shape, *[1] * (values.ndim - 2)), 0)


def _take(values: Tensor, source: Tensor) -> Tensor:
    return values.gather(1, source.reshape(*source.shape, *[1] * (values.ndim - 2)).expand(values.shape))
