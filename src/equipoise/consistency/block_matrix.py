"""Block structure of the supermatrix: validation, block sizes and splitting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError

SquareMatrix = Float[Tensor, "... size size"]


def sizes_of(matrix: SquareMatrix, num_modalities: int | None, sizes: Sequence[int] | None, who: str) -> list[int]:
    """Returns the number of tokens of each modality: ``sizes``, or ``num_modalities`` equal parts.

    Raises:
        ShapeError: the matrix is not square, or the sizes do not add up to its size.
        ConfigError: neither or both arguments are given.
    """
    size = check_square(matrix, who)
    if (num_modalities is None) == (sizes is None):
        raise ConfigError(
            who, expected="num_modalities, or sizes if the numbers of tokens differ", got="both" if sizes else "neither"
        )
    if sizes is not None:
        if sum(sizes) != size or min(sizes, default=0) < 1:
            raise ShapeError(who, expected=f"sizes >= 1 that add up to {size}", got=f"{tuple(sizes)}")
        return list(sizes)
    count = int(num_modalities)  # type: ignore[arg-type]
    if count < 1 or size % count:
        raise ShapeError(
            who, expected=f"a matrix of num_modalities = {count} equal blocks", got=f"size {size}",
            fix="Pass sizes=(tokens of the first modality, of the second, ...) if they differ.",
        )  # fmt: skip
    return [size // count] * count


def check_square(matrix: SquareMatrix, who: str) -> int:
    """Validates a square matrix of finite numbers and returns its size.

    Raises:
        ShapeError: the shape or dtype is invalid. NonFiniteError: the matrix contains NaN or infinity.
    """
    if not isinstance(matrix, Tensor) or matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        got = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ShapeError(
            who, expected="a square matrix (..., N M, N M)", got=got, fix="Create one with eq.consistency.supermatrix."
        )
    if not matrix.is_floating_point():
        raise ShapeError(who, expected="a floating matrix", got=f"{matrix.dtype}", fix="Use P.float().")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(who, expected="finite numbers", got="NaN or infinity in the matrix")
    return matrix.shape[-1]


def split_blocks(matrix: SquareMatrix, sizes: Sequence[int]) -> list[list[Tensor]]:
    """Splits the matrix: ``split_blocks(P, sizes)[i][j]`` maps modality i to j."""
    return [list(row.split(list(sizes), dim=-1)) for row in matrix.split(list(sizes), dim=-2)]
