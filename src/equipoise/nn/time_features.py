"""Times of tokens as features, and times of groups of frames."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ShapeError


def sinusoidal_times(
    times: Float[Tensor, "batch token"], dim: int, *, periods: tuple[float, float] = (0.1, 100.0)
) -> Float[Tensor, "batch token dim"]:
    """Computes sinusoidal features (batch, token, dim) of times in seconds, in float64 (float32 on MPS).

    Features 2k and 2k+1 are ``sin(2 pi t / P_k)`` and ``cos(2 pi t / P_k)`` with the periods
    ``P_k = shortest (longest / shortest)^(k / (K - 1))``, k = 0 ... K-1, K = dim // 2; K = 1 has the shortest period
    only. An odd last feature is 0.

    Args:
        times: (batch, token) seconds; NaN = unknown, whose features are 0.
        dim: number of features.
        periods: shortest and longest period in seconds. Differences in time far below the shortest one are not
            visible; times that differ by the longest one are nearly the same.

    Reference: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, with seconds in place of positions.

    Example:
        >>> sinusoidal_times(torch.tensor([[0.25, torch.nan]]), 2, periods=(1.0, 1.0)).round().int()
        tensor([[[1, 0],
                 [0, 0]]], dtype=torch.int32)
    """
    shortest, longest = periods
    # Angles of Unix timestamps need double precision.
    exact = torch.float32 if times.device.type == "mps" else torch.float64
    steps = torch.arange(dim // 2, device=times.device, dtype=exact) / max(dim // 2 - 1, 1)
    angles = 2 * math.pi * times.to(exact)[..., None] / (shortest * (longest / shortest) ** steps)
    features = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return nn.functional.pad(features, (0, dim % 2)).masked_fill(times.isnan()[..., None], 0.0)


def group_times(
    times: Float[Tensor, "batch frame"], mask: Tensor | None, shape: tuple[int, ...], size: int, who: str
) -> Float[Tensor, "batch group"]:
    """Computes the mean time of each group of ``size`` successive frames, over valid frames of known time.

    Args:
        times: (batch, frame) seconds; NaN = unknown.
        mask: (batch, frame), True for valid frames.
        shape: expected (batch, frame).
        size: frames per group; the last one may be incomplete.
        who: name for error messages.

    Returns:
        (batch, group); NaN for groups without a valid frame of known time.

    Raises:
        ShapeError: times of another shape, or that are not floating-point numbers.

    Example:
        >>> group_times(torch.tensor([[1.0, 2.0, torch.nan, 4.0, torch.nan]]), None, (1, 5), 2, "example")
        tensor([[1.5000, 4.0000,    nan]])
    """
    if times.shape != shape or not times.is_floating_point():
        raise ShapeError(
            f"{who} times", expected=f"(batch, frame) = {tuple(shape)}, floating-point seconds",
            got=f"shape {tuple(times.shape)}, {times.dtype}",
        )  # fmt: skip
    valid = ~times.isnan() if mask is None else mask & ~times.isnan()
    missing = -shape[1] % size
    valid, times = (
        nn.functional.pad(part, (0, missing)).unflatten(1, (-1, size))
        for part in (valid, times.masked_fill(~valid, 0.0))
    )
    return (times.sum(dim=2) / valid.sum(dim=2).clamp(min=1)).masked_fill(~valid.any(dim=2), torch.nan)
