"""Random numbers that repeat: of a seed and a step alone, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, distributed


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one optimizer step, alike on all processes; nobody else's random numbers move.

    Example:
        >>> float(torch.rand((), generator=drawing(0, 7))) == float(torch.rand((), generator=drawing(0, 7)))
        True
    """
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def uniform_per_sample(random: torch.Generator, before: int, size: int, count: int) -> Float[Tensor, "sample count"]:
    """Uniform numbers in [0, 1) for the samples of a batch, each by its place in the whole optimizer step.

    So batches that are accumulated draw what one large batch does, and so do the equal parts of several processes.

    Args:
        random: of this step, from which nothing was drawn for samples before.
        before: samples of the step's earlier batches on this process.
        size: samples of this batch.
        count: numbers for each sample.

    Example:
        >>> whole = sample_draws(drawing(0, 7), 0, 5, 2)
        >>> torch.equal(sample_draws(drawing(0, 7), 3, 2, 2), whole[3:])
        True
    """
    several = distributed.is_available() and distributed.is_initialized()
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
    start = world * before + rank * size
    return torch.rand(world * (before + size), count, generator=random)[start : start + size]
