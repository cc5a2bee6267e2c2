"""Corruptions that change values without replacing them: additive noise, gain, clipping, blur, drift."""

from __future__ import annotations

import torch
from torch import Tensor

from .input_frames import InputFrames


def additive(frames: InputFrames, level: float) -> Tensor:
    """Adds white noise at a signal-to-noise ratio of ``level`` dB, relative to the variance of each sample."""
    _, std = frames.statistics()
    return frames.values + std * 10 ** (-level / 20) * frames.normal()


def gain(frames: InputFrames, level: float) -> Tensor:
    """Multiplies the values by ``level``.

    Adds log(level) standard deviations to a spectrogram, which is logarithmic.
    """
    if frames.kind == "spectrogram":
        return frames.values + frames.std * float(torch.tensor(level).log())
    return frames.values * level


def clipping(frames: InputFrames, level: float) -> Tensor:
    """Limits the values to ``level`` standard deviations around the mean of the training inputs."""
    return frames.values.clamp(frames.mean - level * frames.std, frames.mean + level * frames.std)


def blur(frames: InputFrames, level: float) -> Tensor:
    """Averages each value with its neighbors in a window of ``level`` of the sample, in both directions of images."""
    smooth = _moving_mean(frames.values, frames.count, level)
    if frames.kind in ("image", "spectrogram"):
        across = smooth.movedim(-1, 1)
        width = torch.full_like(frames.count, across.shape[1])
        smooth = _moving_mean(across, width, level).movedim(1, -1)
    return smooth


def drift(frames: InputFrames, level: float) -> Tensor:
    """Adds a ramp from 0 to ``level`` standard deviations over the frames, up or down at random for each sample.

    The features of a vector have a fixed offset with a random sign, the same in all samples: a sensor out of
    calibration.
    """
    size = level * frames.std
    if frames.kind == "vector":
        return frames.values + size * (1 - 2 * (frames.uniform(1, frames.size[1]) < 0.5).to(frames.values))
    sign = 1 - 2 * (frames.uniform(frames.size[0]) < 0.5).to(frames.values)
    ramp = frames.position / (frames.count[:, None] - 1).clamp(min=1)
    return frames.values + frames.expand(size * sign[:, None] * ramp.to(frames.values))


def _moving_mean(values: Tensor, count: Tensor, fraction: float) -> Tensor:
    """Mean over the neighbors at a distance of at most half a window of ``fraction`` of the valid frames, and of 1."""
    reach = (fraction * count / 2).round().clamp(min=1).long()[:, None]
    position = torch.arange(values.shape[1], device=values.device)[None]
    low = (position - reach).clamp(min=0)
    high = torch.minimum(position + reach + 1, count[:, None].clamp(min=1))
    low = torch.minimum(low, high - 1)
    sums = values.double().cumsum(dim=1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)

    def at(index: Tensor) -> Tensor:
        return sums.gather(1, index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(values.shape))

    number = (high - low).reshape(*high.shape, *[1] * (values.ndim - 2))
    return ((at(high) - at(low)) / number).to(values.dtype)
