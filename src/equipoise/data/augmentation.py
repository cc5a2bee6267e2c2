"""What is done to a batch of inputs before a model sees it: shift, gain, tilt and noise."""

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
    """Each spectrogram moved later by its number of frames (earlier if negative); what comes in is ``fill``.

    Example:
        >>> shifted(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([1]), torch.tensor([0.0]))[0, :, 0]
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
    """Log-spectrograms made louder by ``gain`` and, from the lowest band to the highest, by -``tilt`` to +``tilt``.

    Example:
        >>> tilted(torch.zeros(1, 1, 3), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([[[0.5000, 1.0000, 1.5000]]])
    """
    slope = torch.linspace(-1.0, 1.0, spectrogram.shape[2])
    return spectrogram + (gain[:, None] + tilt[:, None] * slope)[:, None]


def augment_spectrogram(
    spectrogram: Float[Tensor, "batch time band"], draw: CounterRNG, *, frames: int, gain: float, tilt: float,
    fill: Float[Tensor, " band"],
) -> Float[Tensor, "batch time band"]:  # fmt: skip
    """The same words said at another moment, by a louder voice, into another microphone.

    Args:
        spectrogram: standardized log-energies.
        draw: the batch's random numbers.
        frames: the shift is uniform in {-frames, ..., frames}.
        gain, tilt: uniform in [-gain, gain] and [-tilt, tilt], in standard deviations.
        fill: (band,) value of silence.

    Example:
        >>> draw = Draw(0, 0, torch.tensor([0]))
        >>> varied(torch.ones(1, 2, 3), draw, frames=0, gain=0.0, tilt=0.0, fill=torch.zeros(3)).unique()
        tensor([1.])
    """
    dice = draw.uniform("variation", 3)
    shift = (dice[:, 0] * (2 * frames + 1)).long() - frames
    return spectral_tilt(
        random_shift(spectrogram, shift, fill), gain * (2 * dice[:, 1] - 1), tilt * (2 * dice[:, 2] - 1)
    )


def add_noise(values: Tensor, deviation: float, draw: CounterRNG, purpose: str) -> Tensor:
    """(values + deviation * noise) / sqrt(1 + deviation^2), with standard normal noise; values are (batch, ...).

    The division keeps standardized inputs standardized, so that nobody can tell a modality that was replaced by
    noise from a healthy one by its variance alone.

    Example:
        >>> draw = Draw(0, 0, torch.tensor([0]))
        >>> torch.equal(noisy(torch.ones(1, 5), 0.0, draw, "hiss"), torch.ones(1, 5))
        True
    """
    fresh = draw.normal(f"noise/{purpose}", *values.shape[1:])
    return (values + deviation * fresh) / math.sqrt(1 + deviation**2)


def check_deviations(who: str, **deviations: float) -> None:
    """Raises ConfigError where a standard deviation of noise is negative or not finite."""
    for name, value in deviations.items():
        if not 0 <= value < math.inf:
            raise ConfigError(who, expected=f"a finite {name} >= 0", got=f"{name} = {value}")
