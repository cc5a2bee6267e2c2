"""What is done to a batch of inputs before a model sees it: shift, gain, tilt, exposure to noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def corrupt_batch(
    inputs: Mapping[str, Tensor], noise: Mapping[str, tuple[float, float]], probability: float, draw: CounterRNG
) -> dict[str, Tensor]:
    """Whole modalities replaced by Gaussian noise, each with the given probability, never all of one sample.

    Training on such batches teaches a model that a modality may be worthless. Where the dice fall on every modality
    of a sample, one of them, equally likely, is spared; so with M modalities the rate of each is
    probability - probability**M / M. A single modality is never replaced.

    Args:
        inputs: name -> (batch, ...).
        noise: name -> (mean, standard deviation) of the noise.
        probability: for each modality and sample, in [0, 1].
        draw: the batch's random numbers.

    Raises:
        ConfigError: a probability outside [0, 1].

    Example:
        >>> inputs = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
        >>> draw = Draw(seed=0, epoch=0, index=torch.tensor([0]))
        >>> replaced = exposed(inputs, {"a": (5.0, 0.0), "b": (5.0, 0.0)}, 1.0, draw)
        >>> sorted(x.max().item() for x in replaced.values())
        [0.0, 5.0]
    """
    if not 0 <= probability <= 1:
        raise ConfigError("exposed", expected="a probability in [0, 1]", got=f"{probability}")
    names = list(inputs)
    hit = draw.uniform("exposure", len(names)) < probability
    spared = (draw.uniform("spared", 1)[:, 0] * len(names)).long()
    hit &= ~(hit.all(dim=1)[:, None] & (spared[:, None] == torch.arange(len(names))))
    return {name: _replaced(name, inputs[name], hit[:, column], noise[name], draw) for column, name in enumerate(names)}


def _replaced(name: str, values: Tensor, hit: Tensor, noise: tuple[float, float], draw: CounterRNG) -> Tensor:
    rows = hit.nonzero()[:, 0]
    chosen = CounterRNG(draw.seed, draw.epoch, draw.index[rows], draw.salt)
    mean, deviation = noise
    fresh = mean + deviation * chosen.normal(f"exposure to noise/{name}", *values.shape[1:])
    return values.index_copy(0, rows, fresh.to(values.dtype))
