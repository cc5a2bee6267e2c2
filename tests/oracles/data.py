"""Reference computations of the data sets: slow and simple, in float64 or plain integers."""

import math

import numpy as np


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, with Python's own integers."""
    words, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        word = state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        words.append(word ^ (word >> 31))
    return words


def log_mel(waveform: np.ndarray, floor: float) -> np.ndarray:
    """(5120,) -> (64, 40) by sums over single samples and single frequencies."""
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 256) for n in range(256)]
    silent = np.concatenate([np.zeros(88), waveform.astype(np.float64), np.zeros(88)])
    turns = np.exp(-2j * math.pi * np.outer(np.arange(257), np.arange(256)) / 512)
    highest = 2595 * math.log10(1 + 4000 / 700)
    edges = [700 * (10 ** (highest * step / 41 / 2595) - 1) for step in range(42)]
    energy = np.zeros((64, 40))
    for frame in range(64):
        power = np.abs(turns @ (silent[80 * frame : 80 * frame + 256] * window)) ** 2
        for band in range(40):
            low, mid, high = edges[band : band + 3]
            for k in range(257):
                f = k * 8000 / 512
                if low < f <= mid:
                    energy[frame, band] += power[k] * (f - low) / (mid - low)
                elif mid < f < high:
                    energy[frame, band] += power[k] * (high - f) / (high - mid)
    return np.log(energy + floor)


def shifted(spectrogram: np.ndarray, frames: list[int], fill: np.ndarray) -> np.ndarray:
    moved = np.empty_like(spectrogram)
    for sample, by in enumerate(frames):
        for time in range(spectrogram.shape[1]):
            source = time - by
            inside = 0 <= source < spectrogram.shape[1]
            moved[sample, time] = spectrogram[sample, source] if inside else fill
    return moved


def reconstructed(train: np.ndarray, images: np.ndarray, energy: float) -> tuple[int, np.ndarray]:
    """(components kept, reconstruction without the mean) by the singular values of the centered training images."""
    mean = train.mean(axis=0)
    _, singular, rows = np.linalg.svd(train - mean, full_matrices=False)
    total, held, count = (singular**2).sum(), 0.0, 0
    while held < energy * total:
        held += singular[count] ** 2
        count += 1
    result = np.zeros_like(images)
    for row in rows[:count]:
        for sample, image in enumerate(images):
            result[sample] += ((image - mean) @ row) * row
    return count, result
