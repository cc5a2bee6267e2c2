"""Pools a supermatrix: averages neighboring tokens, to aggregate samples and to plot them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from ..tokens.masks import at_least_float32 as exact
from ..tokens.masks import full_precision
from .block_matrix import SquareMatrix, sizes_of


def overlaps(tokens: int, parts: int) -> Float[Tensor, "part token"]:
    """Computes the overlap of each token with each of ``parts`` equal intervals; columns sum to 1.

    Example:
        >>> overlaps(3, 2)
        tensor([[1.0000, 0.5000, 0.0000],
                [0.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    ends = torch.arange(tokens + 1, dtype=torch.float64) / tokens
    edges = torch.arange(parts + 1, dtype=torch.float64) / parts
    low = torch.maximum(edges[:-1, None], ends[None, :-1])
    high = torch.minimum(edges[1:, None], ends[None, 1:])
    return (high - low).clamp(min=0) * tokens


def pool_to_slots(
    matrix: SquareMatrix, *, sizes: Sequence[int], parts: Sequence[int]
) -> Float[Tensor, "... smaller smaller"]:
    """Pools the maps to intervals of tokens: averages rows and sums columns; diagonal blocks remain the identity.

    Args:
        matrix: (..., T, T) supermatrix, rows map to columns.
        sizes: tokens of each modality, T in all.
        parts: number of intervals of each modality, from 1 to its number of tokens.

    Returns:
        (..., sum of parts, sum of parts); rows of maps still sum to 1.

    Raises:
        ShapeError: the sizes do not match, or there are more intervals than tokens.

    Example:
        >>> pool_to_slots(torch.eye(4).repeat(2, 2), sizes=(4, 4), parts=(2, 2))
        tensor([[1., 0., 1., 0.],
                [0., 1., 0., 1.],
                [1., 0., 1., 0.],
                [0., 1., 0., 1.]])
    """
    sizes = sizes_of(matrix, None, sizes, "pool_to_slots")
    if len(parts) != len(sizes) or any(not 1 <= few <= many for few, many in zip(parts, sizes, strict=True)):
        raise ShapeError(
            "pool_to_slots parts",
            expected=f"one number for each of {tuple(sizes)}, from 1 to this size",
            got=f"{tuple(parts)}",
        )
    values = exact(matrix)
    into = torch.block_diag(*(overlaps(many, few) for many, few in zip(sizes, parts, strict=True))).to(values)
    with full_precision(values):
        pooled = (into / into.sum(dim=1, keepdim=True)) @ values @ into.transpose(0, 1)
    diagonal = torch.block_diag(*(torch.ones(few, few) for few in parts)).to(values.device).bool()
    return torch.where(diagonal, torch.eye(sum(parts)).to(values), pooled)
