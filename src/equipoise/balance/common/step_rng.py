"""Random numbers that depend on seed and step only, so that resumed runs repeat them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...nn.distributed import rank_and_world


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator seeded by (seed, step), identical on all processes; the global RNG is not touched.

    Example:
        >>> first, second = (torch.rand(2, generator=step_generator(0, 7)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def uniform_per_sample(random: torch.Generator, before: int, size: int, count: int) -> Float[Tensor, "sample count"]:
    """Returns uniform numbers in [0, 1) for the samples of a batch, by their position in the whole optimizer step.

    Accumulated batches, and equal parts on several processes, therefore get the same numbers as one large batch.

    Args:
        random: generator of the step, before any per-sample draws.
        before: number of samples in the step's earlier batches on this process.
        size: number of samples in this batch.
        count: numbers per sample.

    Example:
        >>> whole = uniform_per_sample(step_generator(0, 7), 0, 5, 2)
        >>> torch.equal(uniform_per_sample(step_generator(0, 7), 3, 2, 2), whole[3:])
        True
    """
    rank, world = rank_and_world()
    start = world * before + rank * size
    return torch.rand(world * (before + size), count, generator=random)[start : start + size]
