"""Augmentation of batches: time shift, gain, spectral tilt and noise."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError
from .counter_rng import CounterRNG


def random_shift(
    spectrogram: Float[Tensor, "batch time band"], frames: Int[Tensor, " batch"], fill: Float[Tensor, " band"]
) -> Float[Tensor, "batch time band"]:
    """Shifts each spectrogram in time by its number of frames (earlier if negative) and pads with ``fill``.

    Example:
        >>> random_shift(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([1]), torch.tensor([0.0]))[0, :, 0]
        tensor([0., 1., 2.])
    """
    length = spectrogram.shape[1]
    source = torch.arange(length) - frames[:, None]
    moved = spectrogram.gather(1, source.clamp(0, length - 1)[..., None].expand_as(spectrogram))
    inside = (source >= 0) & (source < length)
    return torch.where(inside[..., None], moved, fill.expand_as(moved))


def spectral_tilt(
    spectrogram: Float[Tensor, "batch time band"], gain: Float[Tensor, " batch"], tilt: Float[Tensor, " batch"]
) -> Float[Tensor, "batch time band"]:
    """Adds ``gain`` to log-spectrograms, and a slope over the bands from -``tilt`` (lowest) to +``tilt`` (highest).

    Example:
        >>> spectral_tilt(torch.zeros(1, 1, 3), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([[[0.5000, 1.0000, 1.5000]]])
    """
    slope = torch.linspace(-1.0, 1.0, spectrogram.shape[2])
    return spectrogram + (gain[:, None] + tilt[:, None] * slope)[:, None]


def augment_spectrogram(
    spectrogram: Float[Tensor, "batch time band"], draw: CounterRNG, *, frames: int, gain: float, tilt: float,
    fill: Float[Tensor, " band"],
) -> Float[Tensor, "batch time band"]:  # fmt: skip
    """Augments spectrograms: random time shift, gain and spectral tilt.

    Args:
        spectrogram: standardized log-energies.
        draw: random numbers of the batch.
        frames: the shift is uniform in {-frames, ..., frames}.
        gain, tilt: uniform in [-gain, gain] and [-tilt, tilt], in standard deviations.
        fill: (band,) values of silence, used as padding.

    Example:
        >>> draw = CounterRNG(0, 0, torch.tensor([0]))
        >>> augment_spectrogram(torch.ones(1, 2, 3), draw, frames=0, gain=0.0, tilt=0.0, fill=torch.zeros(3)).unique()
        tensor([1.])
    """
    uniform = draw.uniform("variation", 3)
    shift = (uniform[:, 0] * (2 * frames + 1)).long() - frames
    return spectral_tilt(
        random_shift(spectrogram, shift, fill), gain * (2 * uniform[:, 1] - 1), tilt * (2 * uniform[:, 2] - 1)
    )


def add_noise(values: Tensor, deviation: float, draw: CounterRNG, purpose: str) -> Tensor:
    """Returns (values + deviation * noise) / sqrt(1 + deviation^2) with standard normal noise; values are (batch, ...).

    The division keeps standardized inputs standardized, so that the variance alone does not reveal whether a modality
    was replaced by noise.

    Example:
        >>> draw = CounterRNG(0, 0, torch.tensor([0]))
        >>> torch.equal(add_noise(torch.ones(1, 5), 0.0, draw, "hiss"), torch.ones(1, 5))
        True
    """
    fresh = draw.normal(f"noise/{purpose}", *values.shape[1:])
    return (values + deviation * fresh) / math.sqrt(1 + deviation**2)


def check_deviations(who: str, **deviations: float) -> None:
    """Raises ConfigError if a standard deviation of noise is negative or not finite."""
    for name, value in deviations.items():
        if not 0 <= value < math.inf:
            raise ConfigError(who, expected=f"a finite {name} >= 0", got=f"{name} = {value}")
