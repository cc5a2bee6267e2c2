"""`two_rates`: two streams with timestamps; the label is whether their events happen at the same time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError
from ..augmentation import check_deviations
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split

FEATURES = 6
FRAMES = {"audio": 64, "sensor": 32}
RATES = {"audio": (8.0, 16.0), "sensor": (4.0, 8.0)}
"""Lowest and highest frame rate of a stream in Hz, drawn for each sample."""
START, END = 0.5, 4.0
"""Streams start between 0 and START seconds and end between END - START and END."""
GAP = (0.4, 1.0)
"""Distance of events at different times, in seconds."""
JITTER, WIDTH = 0.05, 0.2
"""Largest deviation of an event from its time, and the standard deviation of its shape, in seconds."""


class TwoRates(Dataset):
    """Samples of two streams with one event each: did both events happen at the same time?

    Each stream of each sample has its own start time and frame rate, so the index of a frame does not determine its
    time; the timestamps do::

        frame_i = noise + strength exp(-(t_i - event)^2 / (2 WIDTH^2)) pattern,   t_i = start + i / rate

    Class 1: both events at the same time, up to a jitter. Class 0: 0.4 to 1 seconds apart. In both classes, the event
    of a stream has the same distribution, so that a single stream contains no information on the class. Streams of
    different lengths are padded and masked; times of padding are 0.

    Args:
        samples: size of the training split; validation has 3 for every 10 of them, the test 5.
        strength: height of an event; frames have noise of standard deviation 1, patterns have length sqrt(6).
        seed: of patterns, events, rates and noise.

    Raises:
        ConfigError: fewer than 10 samples, a negative strength.

    Example:
        >>> data = TwoRates(samples=20)
        >>> batch = data.batch("test", torch.arange(10), seed=0, epoch=0, train=False)
        >>> batch["audio"].shape, batch["times"]["audio"].shape
        (torch.Size([10, 64, 6]), torch.Size([10, 64]))
    """

    names = tuple(FRAMES)
    num_outputs = 2

    def __init__(self, *, samples: int = 1000, strength: float = 3.0, seed: int = 0) -> None:
        if samples < 10:
            raise ConfigError("TwoRates", expected="samples >= 10", got=f"samples = {samples}")
        check_deviations("TwoRates", strength=strength)
        self._strength, self._seed = strength, seed
        self.train, self.val, self.test = (
            self._split(name, size)
            for name, size in (("train", samples), ("val", samples * 3 // 10), ("test", samples // 2))
        )
        self.noise = {name: _statistics(self.train, name) for name in FRAMES}

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs

    def _split(self, split: str, size: int) -> Split:
        draw = CounterRNG(self._seed, 0, torch.arange(size), split)
        target = (draw.uniform("class", 1)[:, 0] < 0.5).long()
        inputs, times, mask = {}, {}, {}
        for name, event in zip(FRAMES, self._events(draw, target.bool()), strict=True):
            times[name], mask[name] = _stream(draw, name)
            height = self._strength * (-(times[name] - event[:, None]).square() / (2 * WIDTH**2)).exp()
            pattern = CounterRNG(self._seed, 0, torch.zeros(1, dtype=torch.long), "patterns").normal(name, FEATURES)
            pattern = pattern * FEATURES**0.5 / pattern.norm()
            frames = draw.normal(f"noise/{name}", FRAMES[name], FEATURES) + height[..., None] * pattern
            inputs[name] = frames.masked_fill(~mask[name][..., None], 0.0)
        return Split(inputs, target, mask, times)

    @staticmethod
    def _events(draw: CounterRNG, together: Tensor) -> Float[Tensor, "modality sample"]:
        """Draws times u and v = u +- gap: (u, v) or (v, u) in class 0, (u, u) or (v, v) in class 1."""
        u, gap, sign, first, *jitter = draw.uniform("events", 6).T
        gap = GAP[0] + (GAP[1] - GAP[0]) * gap
        # Within the part of the recording that all streams cover.
        low, high = START + GAP[1], END - START - GAP[1]
        u = low + (high - low) * u
        v = torch.where(sign < 0.5, u + gap, u - gap)
        audio, other = torch.where(first < 0.5, u, v), torch.where(first < 0.5, v, u)
        return torch.stack([audio, torch.where(together, audio, other)]) + JITTER * (2 * torch.stack(jitter) - 1)


def _stream(draw: CounterRNG, name: str) -> tuple[Float[Tensor, "sample frame"], Bool[Tensor, "sample frame"]]:
    """Draws start, end and rate of a stream; returns the times of its frames and the mask."""
    start, end, rate = draw.uniform(f"stream/{name}", 3).T[..., None]
    low, high = RATES[name]
    times = START * start + torch.arange(FRAMES[name]) / (low + (high - low) * rate)
    mask = times < END - START * end
    return times.masked_fill(~mask, 0.0), mask


def _statistics(split: Split, name: str) -> tuple[float, float]:
    """Mean and standard deviation of the valid frames."""
    valid = split.inputs[name][split.mask[name]]
    return valid.mean().item(), valid.std(correction=0).item()
