"""Corruptions that replace values: noise, zeros, constants, other samples."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .input_frames import InputFrames


def white_noise(frames: InputFrames, level: float) -> Tensor:
    """Mixes white noise with the mean and standard deviation of the training inputs.

    ``x <- sqrt(1 - level^2) x + level (mean + std e)``; level 1 replaces the input.
    """
    return _mix(frames.values, frames.mean + frames.std * frames.normal(), level)


def own_noise(frames: InputFrames, level: float) -> Tensor:
    """Mixes white noise with the mean and standard deviation of each sample, which hides the noise from statistics."""
    mean, std = frames.statistics()
    return _mix(frames.values, mean + std * frames.normal(), level)


def zeros(frames: InputFrames, level: float) -> Tensor:
    """Sets a contiguous part of each sample to 0; level is its extent."""
    return frames.values.masked_fill(frames.region(level), 0)


def constant(frames: InputFrames, level: float) -> Tensor:
    """Sets a contiguous part of each sample to one random value with the statistics of the training inputs."""
    value = frames.mean + frames.std * frames.normal(frames.size[0])
    return torch.where(frames.region(level), frames.expand(value), frames.values)


def partial(frames: InputFrames, level: float) -> Tensor:
    """Replaces a contiguous part of each sample by white noise with the statistics of the training inputs."""
    return torch.where(frames.region(level), frames.mean + frames.std * frames.normal(), frames.values)


def replaced(frames: InputFrames, level: float) -> Tensor:
    """Replaces a fraction of the tokens by tokens drawn from the whole batch."""
    pool = frames.values[frames.valid]
    if len(pool) == 0:
        return frames.values
    drawn = (frames.uniform(*frames.size) * len(pool)).long()
    return torch.where(frames.chosen(level), pool[drawn], frames.values)


def swap_partners(present: Bool[Tensor, " batch"], random: torch.Generator) -> Int[Tensor, " batch"]:
    """Returns another sample for each sample that has the modality, at random and each once.

    A single sample keeps its own values.

    Example:
        >>> swap_partners(torch.tensor([True, False, True]), torch.Generator()).tolist()
        [2, 1, 0]
    """
    partner = torch.arange(len(present))
    members = partner[present.cpu()]
    order = members[torch.randperm(len(members), generator=random)]
    partner[order] = order.roll(1)
    return partner.to(present.device)


def _mix(values: Tensor, noise: Tensor, level: float) -> Tensor:
    return noise if level >= 1 else (1 - level**2) ** 0.5 * values + level * noise
