"""Counter-based random numbers: a function of seed, epoch, sample and purpose, not of earlier draws."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, eq=False)
class CounterRNG:
    """Random numbers for the samples of a batch, a function of (seed, epoch, index, salt, purpose) alone.

    Each sample has its own SplitMix64 stream, seeded by a hash of these five values. A resumed run therefore continues
    bit-exactly, a sample gets the same noise on one process as on eight, and the global RNG is not used.

    Args:
        seed: seed of the run.
        epoch: 0, 1, 2, ...
        index: (batch,) positions of the samples in their split.
        salt: additional key, such as the name of the split.

    Reference: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> whole = CounterRNG(seed=0, epoch=3, index=torch.arange(4)).normal("hiss", 5)
        >>> half = CounterRNG(seed=0, epoch=3, index=torch.arange(2, 4)).normal("hiss", 5)
        >>> torch.equal(whole[2:], half)
        True
    """

    seed: int
    epoch: int
    index: Int[Tensor, " batch"]
    salt: str = ""

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Returns (batch, *shape) float32 values, uniform in [0, 1)."""
        bits = self._bits(purpose, math.prod(shape))
        values = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        return torch.from_numpy(values).reshape(-1, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Returns (batch, *shape) float32 standard normal values (Box-Muller transform, two values per 64 bits)."""
        count = math.prod(shape)
        bits = self._bits(purpose, (count + 1) // 2)
        # The first uniform value is in (0, 1], so that its logarithm is finite.
        first = ((bits >> np.uint64(40)).astype(np.float32) + 1) * np.float32(2**-24)
        angle = (bits & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2 * math.pi * 2**-24)
        radius = np.sqrt(-2 * np.log(first))
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *shape)

    def _bits(self, purpose: str, count: int) -> np.ndarray:
        key = np.zeros(1, dtype=np.uint64)
        for part in (self.seed, self.epoch, zlib.crc32(self.salt.encode()), zlib.crc32(purpose.encode())):
            key = _mix((key ^ np.uint64(part % 2**64)) + _STEP)
        key = _mix((key ^ self.index.cpu().numpy().astype(np.uint64)) + _STEP)
        steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
        return _mix(key[:, None] + steps)


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit in changes about half of the bits out."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
