"""Far-OOD inputs: crops of two photographs and synthetic non-speech sounds."""

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
"""Range of the start and end frequencies of chirps, in Hz."""
FUNDAMENTAL = (80.0, 350.0)
"""Range of the fundamental frequency of harmonic tones, in Hz."""
HARMONICS = 10
SECONDS = (0.2, 0.6)
PEAK = (0.1, 0.5)
"""Range of the peak, as in recordings, so that loudness does not reveal the kind."""


def photo_patches(count: int, side: int) -> Float[Tensor, "count side side"]:
    """Returns random square crops of scikit-learn's two sample photographs, in gray from 0 to 1.

    Args:
        count: number of samples; a larger count begins with the same ones.
        side: width and height, in pixels.

    Example:
        >>> photo_patches(2, 8).shape
        torch.Size([2, 8, 8])
    """
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.tensor(colors, dtype=torch.float32) for colors in load_sample_images().images])
    windows = photographs.mean(dim=-1).div(255).unfold(1, side, 1).unfold(2, side, 1)
    uniform = _draw(count).uniform("patches", 3)
    photograph, top, left = ((uniform[:, axis] * windows.shape[axis]).long() for axis in range(3))
    return windows[photograph, top, left]


def synthetic_sounds(count: int) -> Float[Tensor, "count 5120"]:
    """Returns alternating chirps, harmonic tones and noise bursts of 0.64 s at 8 kHz, with a cosine envelope.

    Chirps are linear, tones have ten harmonics of amplitude 1 / k, noise is white. Frequencies, duration and peak are
    drawn for each sound.

    Args:
        count: number of samples; a larger count begins with the same ones.

    Example:
        >>> synthetic_sounds(3).shape
        torch.Size([3, 5120])
    """
    draw, seconds = _draw(count), SAMPLES / RATE
    uniform = draw.uniform("sounds", 5)
    time = torch.arange(SAMPLES) / RATE
    begin, end, fundamental, length, peak = (
        _rescale(bounds, uniform[:, column, None])
        for column, bounds in enumerate((SWEEP, SWEEP, FUNDAMENTAL, SECONDS, PEAK))
    )
    chirp = torch.sin(2 * math.pi * (begin * time + (end - begin) * time.square() / (2 * seconds)))
    tone = torch.zeros(count, SAMPLES)
    for k in range(1, HARMONICS + 1):
        tone += torch.sin(2 * math.pi * k * fundamental * time) / k
    kinds = torch.stack([chirp, tone, draw.normal("burst", SAMPLES)])
    number = torch.arange(count)
    envelope = torch.cos(math.pi * ((time - seconds / 2) / length).clamp(-0.5, 0.5)).square()
    shaped = kinds[number % len(kinds), number] * envelope
    return peak * shaped / shaped.abs().amax(dim=1, keepdim=True)


def _draw(count: int) -> CounterRNG:
    return CounterRNG(SEED, 0, torch.arange(count), "foreign")


def _rescale(bounds: tuple[float, float], fraction: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * fraction
