"""Log-mel spectrograms of short recordings."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

RATE = 8000
"""Samples per second."""
HOP = 80
"""Hop length in samples: 10 ms."""
WINDOW = 256
"""Window length in samples: 32 ms."""
FFT = 512
"""FFT length; frames are padded to it so that the narrowest mel band contains a frequency bin."""
FRAMES = 64
"""Frames per spectrogram: 0.64 s."""
BANDS = 40


def log_mel(waveform: Float[Tensor, "batch sample"], floor: float) -> Float[Tensor, "batch 64 40"]:
    """Computes the natural logarithm of the energy in 40 mel bands, in 64 frames of 10 ms.

    Frame i is centered on sample 80 i + 40, Hann window of 256 samples.

    Args:
        waveform: (batch, 5120) at 8 kHz, in [-1, 1]; ``framed`` pads or crops recordings to this length.
        floor: added to the energy before the logarithm; much softer sounds vanish below it. White noise of root mean
            square r has an energy of about 96 r^2 per bin.

    Example:
        >>> log_mel(torch.zeros(2, 5120), floor=1.0).shape
        torch.Size([2, 64, 40])
    """
    margin = (WINDOW - HOP) // 2
    padded = torch.nn.functional.pad(waveform, (margin, margin))
    frames = padded.unfold(1, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.view_as_real(torch.fft.rfft(frames, n=FFT)).square().sum(dim=-1)
    return (power @ mel_bands().T + floor).log()


def framed(recording: Float[Tensor, " sample"]) -> Float[Tensor, " 5120"]:
    """Crops a recording to the middle 0.64 s, or pads it with silence on both sides.

    Example:
        >>> framed(torch.ones(2)).nonzero()[:, 0]
        tensor([2559, 2560])
    """
    spare = FRAMES * HOP - len(recording)
    before = spare // 2
    return torch.nn.functional.pad(recording, (before, spare - before))


def log_mel_frames(
    waveform: Float[Tensor, " sample"], rate: int, *, bands: int = 64, floor: float = 1e-6
) -> Float[Tensor, "frame band"]:
    """Computes the log-mel spectrogram of a recording of any rate and length, one frame for each 10 ms begun.

    As ``log_mel``: frame i is centered on the middle of its hop, Hann window of 32 ms, silence before and after.

    Example:
        >>> log_mel_frames(torch.zeros(1_700), 16_000).shape
        torch.Size([11, 64])
    """
    hop, window = round(rate * HOP / RATE), round(rate * WINDOW / RATE)
    fft = 2 ** math.ceil(math.log2(2 * window))
    count, margin = -(-len(waveform) // hop), (window - hop) // 2
    padded = torch.nn.functional.pad(waveform, (margin, count * hop - len(waveform) + window - hop - margin))
    frames = padded.unfold(0, window, hop) * torch.hann_window(window)
    power = torch.view_as_real(torch.fft.rfft(frames, n=fft)).square().sum(dim=-1)
    return (power @ mel_bands(rate, fft, bands).T + floor).log()


@functools.lru_cache(maxsize=32)
def mel_bands(rate: int = RATE, fft: int = FFT, bands: int = BANDS) -> Float[Tensor, "band bin"]:
    """Returns triangular mel filters of height 1.

    They divide mel(f) = 2595 log10(1 + f / 700) up to rate / 2 into bands + 1 equal steps.

    Example:
        >>> bool((mel_bands().sum(dim=1) > 0).all())
        True
    """
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, bands + 2, dtype=torch.float64) * top / 2595) - 1)
    bins = torch.arange(fft // 2 + 1, dtype=torch.float64) * rate / fft
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - left) / (center - left)
    falling = (right - bins) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0).float()
