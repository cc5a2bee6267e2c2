"""Random numbers that repeat: of a seed and a step alone, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import torch


def drawing(seed: int, step: int, *, device: torch.device | str = "cpu", apart: bool = False) -> torch.Generator:
    """A generator for one optimiser step; nobody else's random numbers move.

    Args:
        seed: of the run.
        step: number of the step.
        device: where numbers are drawn.
        apart: each process draws other numbers, as for its own samples; else all draw the same.

    Example:
        >>> float(torch.rand((), generator=drawing(0, 7))) == float(torch.rand((), generator=drawing(0, 7)))
        True
    """
    rank = torch.distributed.get_rank() if apart and _several() else 0
    return torch.Generator(device).manual_seed((seed + 1_000_000 * rank) * 1_000_003 + step)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
