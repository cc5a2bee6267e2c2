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
    """Mean over ordered triples i, j, k of |P_ij P_jk - P_ik|_F^2 / (2 M), in [0, 1] for maps; differentiable.

    For two modalities there is no triple, and the error of pairs is given, |P_ij P_ji - I|_F^2 / (2 M). In float32 or
    better.

    Args:
        matrix: (..., N M, N M).
        num_modalities: N, or ``sizes`` where modalities have different numbers of tokens; M is then that of i.

    Raises:
        ShapeError: blocks that do not fit. ConfigError: a single modality.


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
    """Mean over ordered pairs of |P_ij P_ji - I|_F^2 / (2 M): there and back."""
    parts = sizes_of(matrix, num_modalities, sizes, "pair_error")
    if len(parts) < 2:
        raise ConfigError("pair_error", expected="two or more modalities", got=f"{len(parts)}")
    blocks = split_blocks(exact(matrix), parts)
    errors = []
    for i, j in permutations(range(len(parts)), 2):
        with full_precision(matrix):
            back = blocks[i][j] @ blocks[j][i]
        # Padding is zero on the diagonal too, and leads nowhere.
        eye = torch.diag_embed((blocks[i][i].diagonal(dim1=-2, dim2=-1) != 0).to(back.dtype))
        errors.append((back - eye).square().sum(dim=(-1, -2)) / (2 * parts[i]))
    return torch.stack(errors).mean(dim=0)


class Contradiction(NamedTuple):
    """A way round that does not lead back.

    Attributes:
        path: (modality, token) of every station: i, j, k, and where i itself maps to in k.
        strength: the product of the three maps' entries, in [0, 1].
    """

    path: tuple[tuple[int, int], ...]
    strength: float


def worst_contradictions(
    matrix: Float[Tensor, "size size"], *, num_modalities: int | None = None, sizes: Sequence[int] | None = None,
    most: int = 5,
) -> list[Contradiction]:  # fmt: skip
    """The strongest ways i -> j -> k that end elsewhere than i -> k: "bark -> dog -> man, but bark -> dog".

    Args:
        matrix: one supermatrix.
        most: how many at most.
    """
    parts = sizes_of(matrix, num_modalities, sizes, "worst_contradictions")
    blocks = split_blocks(exact(matrix).detach().cpu(), parts)
    found = []
    for i, j, k in permutations(range(len(parts)), 3):
        for token in range(parts[i]):
            there, first = blocks[i][j][token].max(dim=0)
            on, second = blocks[j][k][int(first)].max(dim=0)
            straight, third = blocks[i][k][token].max(dim=0)
            if int(second) != int(third):
                path = ((i, token), (j, int(first)), (k, int(second)), (k, int(third)))
                found.append(Contradiction(path, float(there * on * straight)))
    return sorted(found, key=lambda one: -one.strength)[:most]


def worst_cycles(
    matrix: Float[Tensor, "size size"], *, num_modalities: int | None = None, sizes: Sequence[int] | None = None,
    most: int = 5,
) -> list[Contradiction]:  # fmt: skip
    """The strongest ways round that come back to another token: "bark -> dog -> man -> silence".

    Each step goes to the token that the map gives most. Two modalities have only ways there and back. A way counts
    once, wherever it begins.

    Args:
        matrix: one supermatrix, rows map to columns.
        most: how many at most.

    Returns:
        Contradictions whose path is i, j, k and i again, or i, j, i, and whose strength is the product of the maps'
        entries. Where j has fewer tokens than i, some must come back elsewhere, though with little strength.
    """
    parts = sizes_of(matrix, num_modalities, sizes, "worst_cycles")
    blocks = split_blocks(exact(matrix).detach().cpu(), parts)
    found: dict[frozenset[tuple[int, int]], Contradiction] = {}
    for round_ in permutations(range(len(parts)), min(len(parts), 3)):
        for token in range(parts[round_[0]]):
            path, strength = [(round_[0], token)], 1.0
            for modality in (*round_[1:], round_[0]):
                value, place = blocks[path[-1][0]][modality][path[-1][1]].max(dim=0)
                path.append((modality, int(place)))
                strength *= float(value)
            # A row without any attention maps to nothing.
            if path[-1] != path[0] and strength > 0:
                way = frozenset(path[:-1])
                if way not in found or found[way].strength < strength:
                    found[way] = Contradiction(tuple(path), strength)
    # Rounding must not decide which of two equals comes first.
    return sorted(found.values(), key=lambda one: (-round(one.strength, 6), one.path))[:most]
