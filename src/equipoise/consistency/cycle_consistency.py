"""Cycle consistency: errors of pairs and cycles of maps, without singular value decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..tokens.masks import at_least_float32 as exact
from ..tokens.masks import full_precision
from .block_matrix import SquareMatrix, sizes_of, split_blocks


def cycle_error(
    matrix: SquareMatrix, *, num_modalities: int | None = None, sizes: Sequence[int] | None = None
) -> Float[Tensor, ...]:
    """Computes the mean over ordered triples i, j, k of |P_ij P_jk - P_ik|_F^2 / (2 M), in [0, 1] for maps.

    For two modalities there are no triples, and the pair error |P_ij P_ji - I|_F^2 / (2 M) is returned. Differentiable;
    in float32 or higher precision.

    Args:
        matrix: (..., N M, N M).
        num_modalities: number N of modalities of equal size.
        sizes: tokens of each modality, instead of ``num_modalities``; M is then the size of modality i.

    Raises:
        ShapeError: the sizes do not match the matrix. ConfigError: there is a single modality.

    Example:
        >>> cycle_error(torch.eye(2).repeat(3, 3), num_modalities=3)
        tensor(0.)
    """
    parts = sizes_of(matrix, num_modalities, sizes, "cycle_error")
    if len(parts) < 2:
        raise ConfigError("cycle_error", expected="two or more modalities", got=f"{len(parts)}")
    if len(parts) == 2:
        return pair_error(matrix, num_modalities=num_modalities, sizes=sizes)
    blocks = split_blocks(exact(matrix), parts)
    with full_precision(matrix):
        errors = [
            (blocks[i][j] @ blocks[j][k] - blocks[i][k]).square().sum(dim=(-1, -2)) / (2 * parts[i])
            for i, j, k in permutations(range(len(parts)), 3)
        ]
    return torch.stack(errors).mean(dim=0)


def pair_error(
    matrix: SquareMatrix, *, num_modalities: int | None = None, sizes: Sequence[int] | None = None
) -> Float[Tensor, ...]:
    """Computes the mean over ordered pairs of the round-trip error |P_ij P_ji - I|_F^2 / (2 M)."""
    parts = sizes_of(matrix, num_modalities, sizes, "pair_error")
    if len(parts) < 2:
        raise ConfigError("pair_error", expected="two or more modalities", got=f"{len(parts)}")
    blocks = split_blocks(exact(matrix), parts)
    errors = []
    for i, j in permutations(range(len(parts)), 2):
        with full_precision(matrix):
            back = blocks[i][j] @ blocks[j][i]
        # Rows of padding are zero, also on the diagonal.
        eye = torch.diag_embed((blocks[i][i].diagonal(dim1=-2, dim2=-1) != 0).to(back.dtype))
        errors.append((back - eye).square().sum(dim=(-1, -2)) / (2 * parts[i]))
    return torch.stack(errors).mean(dim=0)


class Contradiction(NamedTuple):
    """Path through the maps that contradicts another one.

    Attributes:
        path: (modality, token) of each step: i, j, k, and the token of k to which i maps directly.
        strength: product of the entries of the three maps, in [0, 1].
    """

    path: tuple[tuple[int, int], ...]
    strength: float


def worst_contradictions(
    matrix: Float[Tensor, "size size"], *, num_modalities: int | None = None, sizes: Sequence[int] | None = None,
    most: int = 5,
) -> list[Contradiction]:  # fmt: skip
    """Finds the strongest paths i -> j -> k whose end differs from i -> k, as "bark -> dog -> man, but bark -> dog".

    Args:
        matrix: one supermatrix.
        num_modalities, sizes: as for ``cycle_error``.
        most: maximum number of results.
    """
    parts = sizes_of(matrix, num_modalities, sizes, "worst_contradictions")
    blocks = split_blocks(exact(matrix).detach().cpu(), parts)
    contradictions = []
    for i, j, k in permutations(range(len(parts)), 3):
        for token in range(parts[i]):
            to_j, first = blocks[i][j][token].max(dim=0)
            to_k, second = blocks[j][k][int(first)].max(dim=0)
            direct, third = blocks[i][k][token].max(dim=0)
            if int(second) != int(third):
                path = ((i, token), (j, int(first)), (k, int(second)), (k, int(third)))
                contradictions.append(Contradiction(path, float(to_j * to_k * direct)))
    return sorted(contradictions, key=lambda contradiction: -contradiction.strength)[:most]


def worst_cycles(
    matrix: Float[Tensor, "size size"], *, num_modalities: int | None = None, sizes: Sequence[int] | None = None,
    most: int = 5,
) -> list[Contradiction]:  # fmt: skip
    """Finds the strongest cycles that end at another token than they start from, as "bark -> dog -> man -> silence".

    Each step follows the largest entry of the row. With two modalities, cycles are round trips. A cycle is reported
    once, regardless of its starting point.

    Args:
        matrix: one supermatrix, rows map to columns.
        num_modalities, sizes: as for ``cycle_error``.
        most: maximum number of results.

    Returns:
        Contradictions with path i, j, k, i (or i, j, i) and the product of the entries as strength. If j has fewer
        tokens than i, some cycles necessarily end at another token, though with low strength.
    """
    parts = sizes_of(matrix, num_modalities, sizes, "worst_cycles")
    blocks = split_blocks(exact(matrix).detach().cpu(), parts)
    cycles: dict[frozenset[tuple[int, int]], Contradiction] = {}
    for cycle in permutations(range(len(parts)), min(len(parts), 3)):
        for token in range(parts[cycle[0]]):
            path, strength = [(cycle[0], token)], 1.0
            for modality in (*cycle[1:], cycle[0]):
                value, index = blocks[path[-1][0]][modality][path[-1][1]].max(dim=0)
                path.append((modality, int(index)))
                strength *= float(value)
            # A row of zeros maps to no token.
            if path[-1] != path[0] and strength > 0:
                steps = frozenset(path[:-1])
                if steps not in cycles or cycles[steps].strength < strength:
                    cycles[steps] = Contradiction(tuple(path), strength)
    # Round, so that the order of equal strengths does not depend on rounding errors.
    return sorted(cycles.values(), key=lambda one: (-round(one.strength, 6), one.path))[:most]
