"""Pictures and sounds of another task: pieces of two photographs, and sounds that nobody says."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..counter_rng import CounterRNG
from ..log_mel_spectrogram import FRAMES, HOP, RATE

SEED = 0
SAMPLES = FRAMES * HOP
SWEEP = (100.0, 3500.0)
"""Hz, between which a chirp begins and ends."""
FUNDAMENTAL = (80.0, 350.0)
"""Hz, of harmonic tones."""
HARMONICS = 10
SECONDS = (0.2, 0.6)
PEAK = (0.1, 0.5)
"""As loud as recordings are, so that loudness alone tells nothing."""


def photo_patches(count: int, side: int) -> Float[Tensor, "count side side"]:
    """Square pieces of the two photographs that come with scikit-learn, in gray from 0 to 1; place by chance.

    Args:
        count: how many; the first ones of a larger count are the same.
        side: in pixels.

    Example:
        >>> photo_patches(2, 8).shape
        torch.Size([2, 8, 8])
    """
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(colors, dtype=torch.float32) for colors in load_sample_images().images])
    windows = photographs.mean(dim=-1).div(255).unfold(1, side, 1).unfold(2, side, 1)
    dice = _draw(count).uniform("patches", 3)
    photograph, top, left = ((dice[:, axis] * windows.shape[axis]).long() for axis in range(3))
    return windows[photograph, top, left]


def synthetic_sounds(count: int) -> Float[Tensor, "count 5120"]:
    """Chirps, harmonic tones and bursts of noise in turn, 0.64 s at 8 kHz, each swelling and fading in the middle.

    A chirp runs evenly from one frequency to another, a tone has ten harmonics of amplitude 1 / k, noise is white.
    Frequencies, length and loudness are drawn for each.

    Args:
        count: how many; the first ones of a larger count are the same.

    Example:
        >>> synthetic_sounds(3).shape
        torch.Size([3, 5120])
    """
    draw, seconds = _draw(count), SAMPLES / RATE
    dice = draw.uniform("sounds", 5)
    time = torch.arange(SAMPLES) / RATE
    begin, end, fundamental, length, peak = (
        _between(limits, dice[:, column, None])
        for column, limits in enumerate((SWEEP, SWEEP, FUNDAMENTAL, SECONDS, PEAK))
    )
    chirp = torch.sin(2 * math.pi * (begin * time + (end - begin) * time.square() / (2 * seconds)))
    tone = torch.zeros(count, SAMPLES)
    for k in range(1, HARMONICS + 1):
        tone += torch.sin(2 * math.pi * k * fundamental * time) / k
    kinds = torch.stack([chirp, tone, draw.normal("burst", SAMPLES)])
    number = torch.arange(count)
    swell = torch.cos(math.pi * ((time - seconds / 2) / length).clamp(-0.5, 0.5)).square()
    shaped = kinds[number % len(kinds), number] * swell
    return peak * shaped / shaped.abs().amax(dim=1, keepdim=True)


def _draw(count: int) -> CounterRNG:
    return CounterRNG(SEED, 0, torch.arange(count), "foreign")


def _between(limits: tuple[float, float], part: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * part
