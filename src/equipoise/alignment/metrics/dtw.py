"""Dynamic time warping between two sequences."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError
from ...tokens.masks import at_least_float32


def dtw_cost(cost: Float[Tensor, "*batch row column"], *, softness: float = 0.0) -> Float[Tensor, "*batch"]:
    """Cost of the cheapest monotonic alignment path from the first pair to the last.

    ``D_ij = c_ij + min(D_i-1,j, D_i,j-1, D_i-1,j-1)``; with ``softness`` g > 0 the minimum is replaced by
    ``-g log sum exp(-x/g)``. Differentiable; computed in float32 or higher precision.

    Args:
        cost: (..., row, column), for example 1 - cosine between the tokens of two modalities.
        softness: g; 0 is the hard minimum.

    Raises:
        ShapeError: no row or no column. ConfigError: a negative softness.

    Reference: Sakoe and Chiba (1978); Cuturi and Blondel, Soft-DTW (ICML 2017).

    Example:
        >>> dtw_cost(torch.tensor([[0.0, 1.0, 5.0], [4.0, 1.0, 0.0]]))
        tensor(1.)
    """
    return _table(cost, softness)[-1][..., -1]


def dtw_path(cost: Float[Tensor, "row column"]) -> Int[Tensor, "step 2"]:
    """The cheapest path: (row, column) of every step; diagonal steps are preferred among ties.

    Example:
        >>> dtw_path(torch.tensor([[0.0, 1.0, 5.0], [4.0, 1.0, 0.0]])).tolist()
        [[0, 0], [0, 1], [1, 2]]
    """
    if cost.ndim != 2:
        raise ShapeError("warping_path", expected="one matrix of costs (row, column)", got=f"{tuple(cost.shape)}")
    table = torch.stack(_table(cost.detach().cpu(), 0.0)).tolist()
    i, j = len(table) - 1, len(table[0]) - 1
    steps = [[i, j]]
    while i or j:
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min((at for at in before if min(at) >= 0), key=lambda at: table[at[0]][at[1]])
        steps.append([i, j])
    return torch.tensor(steps[::-1])


def _table(cost: Tensor, softness: float) -> list[Tensor]:
    """Computes the rows of the accumulated cost matrix D."""
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ShapeError(
            "warping_cost", expected="costs (..., row, column) with at least one of each", got=f"{tuple(cost.shape)}"
        )  # fmt: skip
    if softness < 0:
        raise ConfigError("warping_cost", expected="softness >= 0", got=f"{softness}")
    cost = at_least_float32(cost)
    rows: list[Tensor] = []
    for i in range(cost.shape[-2]):
        row: list[Tensor] = []
        for j in range(cost.shape[-1]):
            before = [rows[-1][..., j - 1]] if i and j else []
            before += [rows[-1][..., j]] if i else []
            before += [row[-1]] if j else []
            value = cost[..., i, j]
            row.append(value + _smallest(torch.stack(before), softness) if before else value)
        rows.append(torch.stack(row, dim=-1))
    return rows


def _smallest(values: Tensor, softness: float) -> Tensor:
    return -softness * (-values / softness).logsumexp(dim=0) if softness else values.amin(dim=0)
