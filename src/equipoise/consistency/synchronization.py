"""Permutation synchronization: the nearest consistent maps from the leading eigenvectors."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, require_extra, unknown_name
from ..tokens.masks import at_least_float32 as exact
from .block_matrix import SquareMatrix, sizes_of
from .matching_matrix import soft_matching

Kind = Literal["hard", "soft", "orthogonal"]
KINDS = ("hard", "soft", "orthogonal")


def synchronize(
    matrix: SquareMatrix, *, num_modalities: int, kind: Kind = "hard", temperature: float = 0.1, rounds: int = 50
) -> Float[Tensor, "... size size"]:
    """Computes consistent maps P* = [Q_i Q_j^T] from the M leading eigenvectors U of (P + P^T) / 2.

    Q_i is the permutation nearest to X_i X_1^T with X = sqrt(N) U, by linear assignment. A few wrong maps among many
    are corrected.

    Args:
        matrix: (..., N M, N M).
        num_modalities: number N of modalities, with M tokens each.
        kind: ``"hard"``: permutations; ``"soft"``: doubly stochastic maps by Sinkhorn iterations;
            ``"orthogonal"``: the nearest orthogonal maps.
        temperature: temperature of the soft maps.
        rounds: number of Sinkhorn iterations.

    Returns:
        (..., N M, N M), detached; rank M and without contradiction for hard and orthogonal maps.

    Raises:
        ShapeError: the blocks do not match the matrix. ConfigError: unknown kind, or a single modality.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> wrong = torch.eye(2).repeat(5, 5)
        >>> wrong[:2, 2:4] = wrong[2:4, :2] = swap
        >>> bool((synchronize(wrong, num_modalities=5) == torch.eye(2).repeat(5, 5)).all())
        True
    """
    size = sizes_of(matrix, num_modalities, None, "synchronize")[0]
    if num_modalities < 2:
        raise ConfigError("synchronize", expected="two or more modalities", got=f"{num_modalities}")
    if kind not in KINDS:
        raise unknown_name("synchronize", "kind", str(kind), KINDS)
    with torch.no_grad():
        full = exact(matrix).double()
        _, vectors = torch.linalg.eigh((full + full.transpose(-1, -2)) / 2)
        stack = num_modalities**0.5 * vectors[..., -size:].unflatten(-2, (num_modalities, size))
        free = stack @ stack[..., :1, :, :].transpose(-1, -2)
        maps = {"hard": _permutations, "soft": _soft, "orthogonal": _orthogonal}[kind](free, temperature, rounds)
        # The first modality is the reference.
        maps[..., 0, :, :] = torch.eye(size, dtype=maps.dtype, device=maps.device)
        columns = maps.flatten(-3, -2)
        return (columns @ columns.transpose(-1, -2)).to(matrix.dtype)


def _permutations(free: Tensor, temperature: float, rounds: int) -> Tensor:
    with require_extra("synchronize"):
        from scipy.optimize import linear_sum_assignment

    flat = free.reshape(-1, *free.shape[-2:])
    result = torch.zeros_like(flat)
    for number, scores in enumerate(flat.cpu().numpy()):
        rows, columns = linear_sum_assignment(scores, maximize=True)
        result[number, torch.from_numpy(rows), torch.from_numpy(columns)] = 1.0
    return result.view_as(free)


def _soft(free: Tensor, temperature: float, rounds: int) -> Tensor:
    return soft_matching(free / temperature, sinkhorn=rounds)


def _orthogonal(free: Tensor, temperature: float, rounds: int) -> Tensor:
    left, _, right = torch.linalg.svd(free)
    return left @ right
