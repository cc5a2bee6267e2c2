"""Spectrograms of fixed size, as the published loaders of CREMA-D and Kinetics-Sounds compute them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ...errors import DataError

KALDI_RATE, KALDI_WINDOW, KALDI_SHIFT, KALDI_FFT, KALDI_BINS = 16_000, 400, 160, 512, 128
FBANK_FRAMES = 1024
FBANK_MEAN, FBANK_DEVIATION = -4.503877, 5.141276
"""Statistics that the published loader of Kinetics-Sounds subtracts and divides by (twice the deviation)."""
SMALLEST = 1.192092955078125e-07


def stft_188(sound: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "188 257"]:
    """Log magnitudes of 3 s at 22,050 Hz: repeated to 66,150 samples, Hann window of 512, hop 353, centered.

    Example:
        >>> stft_188(np.zeros(1000, np.float32)).shape
        (188, 257)
    """
    values = np.pad(np.clip(_repeated(sound, 66_150), -1.0, 1.0), 256)
    starts = 353 * np.arange(1 + 66_150 // 353)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = values[starts[:, None] + np.arange(512)] * window
    return np.log(np.abs(np.fft.rfft(frames, axis=1)) + 1e-7).astype(np.float32)


def spectrogram_299(sound: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "299 257"]:
    """Log spectrogram of 3 s at 16 kHz, window 512, overlap 353, standardized for each clip.

    Example:
        >>> spectrogram_299(np.ones(1000, np.float32)).shape
        (299, 257)
    """
    return _log_spectrogram(_repeated(sound, 48_000), standardized=True)


def spectrogram_1004(sound: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "1004 257"]:
    """Log spectrogram of 10 s at 16 kHz, window 512, overlap 353.

    Example:
        >>> spectrogram_1004(np.ones(1000, np.float32)).shape
        (1004, 257)
    """
    return _log_spectrogram(_repeated(sound, 160_000), standardized=False)


def fbank_1024(sound: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "1024 128"]:
    """Kaldi's log-mel filter banks of 16 kHz sounds: 128 bins, Hann window of 25 ms, shift 10 ms, without dither.

    The mean of the waveform is removed; the result is cut or padded with zeros to 1,024 frames, then standardized with
    fixed statistics: ``(x + 4.503877) / (2 * 5.141276)``.

    Raises:
        DataError: the sound is shorter than one window.

    Example:
        >>> fbank_1024(np.sin(np.arange(1600, dtype=np.float32))).shape
        (1024, 128)
    """
    if len(sound) < KALDI_WINDOW:
        raise DataError("audio", expected=f"{KALDI_WINDOW} samples at 16 kHz or more", got=f"{len(sound)}")
    features = kaldi_fbank(sound - sound.mean())[:FBANK_FRAMES]
    padded = np.zeros((FBANK_FRAMES, KALDI_BINS), np.float32)
    padded[: len(features)] = features
    return (padded - FBANK_MEAN) / (2 * FBANK_DEVIATION)


def kaldi_fbank(sound: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "frame 128"]:
    """Kaldi's log-mel filter banks of a sound at 16 kHz, without padding.

    Example:
        >>> kaldi_fbank(np.ones(560, np.float32)).shape
        (2, 128)
    """
    starts = KALDI_SHIFT * np.arange(1 + (len(sound) - KALDI_WINDOW) // KALDI_SHIFT)
    frames = sound.astype(np.float64)[starts[:, None] + np.arange(KALDI_WINDOW)]
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(KALDI_WINDOW) / (KALDI_WINDOW - 1)))
    power = np.abs(np.fft.rfft(frames, KALDI_FFT, axis=1)) ** 2
    return np.log(np.maximum(power @ _mel_filters(), SMALLEST)).astype(np.float32)


def _mel_filters() -> Float[np.ndarray, "257 128"]:
    """Triangles of equal width in mel, from 20 Hz to half of the rate."""
    mel = 1127.0 * np.log(1.0 + np.linspace(0, KALDI_RATE / 2, KALDI_FFT // 2 + 1) / 700.0)
    edges = np.linspace(1127.0 * np.log(1 + 20 / 700.0), mel[-1], KALDI_BINS + 2)
    rising = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling))


def _repeated(sound: Float[np.ndarray, " sample"], length: int) -> Float[np.ndarray, " sample"]:
    return np.resize(sound, length)


def _log_spectrogram(sound: np.ndarray, *, standardized: bool) -> np.ndarray:
    from scipy.signal import spectrogram

    _, _, power = spectrogram(sound, 16_000, nperseg=512, noverlap=353)
    log_power = np.log(power.T + 1e-7)
    if standardized:
        log_power = (log_power - log_power.mean()) / max(log_power.std(), 1e-9)
    return log_power.astype(np.float32)
