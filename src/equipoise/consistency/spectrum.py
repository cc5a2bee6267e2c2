"""Spectral measures of consistency: nuclear norm, effective rank and score of the supermatrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..tokens.masks import at_least_float32 as exact
from .block_matrix import SquareMatrix, check_square, sizes_of, split_blocks

Method = Literal["auto", "gram", "svd", "polar"]
METHODS = ("auto", "gram", "svd", "polar")
SMALLEST = 1e-6
"""Singular values below this fraction of the largest are excluded from the gradient."""
POLAR_STEPS = 30
"""Number of Newton-Schulz steps."""


def nuclear_norm(matrix: SquareMatrix, *, method: Method = "auto") -> Float[Tensor, ...]:
    """Computes the sum of the singular values; differentiable, with gradient U V^T over nonzero singular values.

    tr P <= norm, with equality only for symmetric positive semidefinite P. With I on the diagonal it is therefore N M
    for all maps without contradiction, including P = I and uniform maps: it measures contradiction, not alignment.

    Args:
        matrix: (..., size, size).
        method: ``"gram"``: eigenvectors of P P^T, fastest on CPUs; ``"polar"``: Newton-Schulz iteration, which consists
            of matrix products only, for GPUs; ``"svd"``: the reference; ``"auto"``: gram on CPUs, else polar.

    Returns:
        (...,), in float32 or higher precision. Relative error in float32, size 192 to 768: gram 2e-5, polar and svd
        below 1e-6; polar ignores singular values below about 1e-5 of the norm.

    Raises:
        ShapeError: the matrix is not square. NonFiniteError: it contains NaN or infinity. ConfigError: unknown method.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, -4.0])))
        tensor(7.)
    """
    check_square(matrix, "nuclear_norm")
    if method not in METHODS:
        raise unknown_name("nuclear_norm", "method", str(method), METHODS)
    if method == "auto":
        method = "gram" if matrix.device.type == "cpu" else "polar"
    with torch.autocast(matrix.device.type, enabled=False):
        return _NuclearNorm.apply(exact(matrix), method)  # type: ignore[return-value]


class _NuclearNorm(torch.autograd.Function):
    """Computes the norm and U V^T.

    U and V are not differentiated, since repeated singular values give infinite gradients.
    """

    @staticmethod
    def forward(matrix, method):
        direction, norm = {"gram": _by_gram, "svd": _by_svd, "polar": _by_polar}[method](matrix)
        return norm, direction

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        (direction,) = ctx.saved_tensors
        return grad[..., None, None] * direction, None

    @classmethod
    def apply(cls, *args):
        return super().apply(*args)[0]


def _by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nonzero = (values > SMALLEST * values[..., :1]).to(matrix.dtype)
    return (left * nonzero[..., None, :]) @ right, values.sum(dim=-1)


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Computes singular values from the eigenvectors u of P P^T.

    Small singular values are exact as norms of u^T P, unlike square roots of eigenvalues.
    """
    _, left = torch.linalg.eigh(matrix @ matrix.transpose(-1, -2))
    rows = left.transpose(-1, -2) @ matrix
    values = torch.linalg.vector_norm(rows, dim=-1)
    nonzero = values > SMALLEST * values.amax(dim=-1, keepdim=True)
    inverse = torch.where(nonzero, 1 / values.masked_fill(~nonzero, 1.0), 0.0)
    return left @ (rows * inverse[..., None]), values.sum(dim=-1)


def _by_polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Iterates Y <- 1.5 Y - 0.5 Y Y^T Y (Newton-Schulz): nonzero singular values converge to 1, zeros stay zero."""
    norm = torch.linalg.matrix_norm(matrix)[..., None, None]
    polar = matrix / norm.masked_fill(norm == 0, 1.0)
    for _ in range(POLAR_STEPS):
        polar = 1.5 * polar - 0.5 * polar @ polar.transpose(-1, -2) @ polar
    return polar, (polar * matrix).sum(dim=(-1, -2))


def effective_rank(matrix: SquareMatrix, *, method: Method = "auto") -> Float[Tensor, ...]:
    """Computes r* = |P|_*^2 / |P|_F^2: M for consistent hard maps, N M if all singular values are equal.

    For an identity diagonal and rows that sum to 1, M <= r* <= N M. 0 for a zero matrix. Differentiable.

    Example:
        >>> effective_rank(torch.eye(3))
        tensor(3.)
    """
    norm = nuclear_norm(matrix, method=method)
    squared = exact(matrix).square().sum(dim=(-1, -2))
    return norm.square() / squared.masked_fill(squared == 0, 1.0)


def consistency_score(
    matrix: SquareMatrix, *, num_modalities: int | None = None, sizes: Sequence[int] | None = None,
    method: Method = "auto",
) -> Float[Tensor, ...]:  # fmt: skip
    """Computes (T - r*) / (T - M) in [0, 1]: 1 for consistent hard maps, 0 for P = I; T = N M rows, M concepts.

    With unequal ``sizes``, T is their sum and M the smallest; many-to-one maps then cannot reach 1.

    Returns:
        (...,). Soft maps can hide contradictions: half a swap has the score of half an alignment. Use with
        ``cycle_error``.

    Raises:
        ConfigError: neither num_modalities nor sizes is given, or there is a single modality. ShapeError: the sizes do
            not match the matrix.

    Warns:
        if the diagonal is not the identity, since r* may then be below its lower bound; the score is clamped.

    Example:
        >>> consistency_score(torch.eye(6), num_modalities=3)
        tensor(0.)
    """
    parts = sizes_of(matrix, num_modalities, sizes, "consistency_score")
    if len(parts) < 2:
        raise ConfigError("consistency_score", expected="two or more modalities", got=f"{len(parts)}")
    _check_diagonal(matrix, parts)
    total, concepts = sum(parts), min(parts)
    return ((total - effective_rank(matrix, method=method)) / (total - concepts)).clamp(0.0, 1.0)


def contradiction_excess(matrix: SquareMatrix, *, method: Method = "auto") -> Float[Tensor, ...]:
    """Computes (|P|_* - tr P) / tr P >= 0.

    It is 0 for symmetric positive semidefinite P, that is for maps without contradiction.

    Also 0 for a zero matrix, the maps of a sample without tokens.
    """
    trace = exact(matrix).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (nuclear_norm(matrix, method=method) - trace) / trace.masked_fill(trace == 0, 1.0)


def contradiction_free_score(
    matrix: SquareMatrix, *, num_modalities: int, method: Method = "auto"
) -> Float[Tensor, ...]:
    """Computes C = 1 - (|P|_* / (N M) - 1) / (sqrt(N) - 1), in [0, 1]; 1 also for P = I (no alignment)."""
    size = check_square(matrix, "contradiction_free_score")
    if num_modalities < 2:
        raise ConfigError("contradiction_free_score", expected="two or more modalities", got=f"{num_modalities}")
    return 1 - (nuclear_norm(matrix, method=method) / size - 1) / (math.sqrt(num_modalities) - 1)


def top_energy(
    matrix: SquareMatrix, *, num_modalities: int | None = None, sizes: Sequence[int] | None = None
) -> Float[Tensor, ...]:
    """Computes the sum of the M largest singular values divided by T = N M, in (0, 1]; 1 for consistent hard maps.

    With unequal ``sizes``, T is their sum and M the smallest.
    """
    parts = sizes_of(matrix, num_modalities, sizes, "top_energy")
    return torch.linalg.svdvals(exact(matrix))[..., : min(parts)].sum(dim=-1) / sum(parts)


class Spectral(NamedTuple):
    """Spectral measures of one supermatrix or of a batch; see the functions of the same names."""

    consistency_score: Float[Tensor, ...]
    effective_rank: Float[Tensor, ...]
    contradiction_excess: Float[Tensor, ...]
    top_energy: Float[Tensor, ...]


def spectral(matrix: SquareMatrix, *, sizes: Sequence[int]) -> Spectral:
    """Computes all spectral measures of a symmetric supermatrix with I on the diagonal from one eigendecomposition.

    No gradient.

    Example:
        >>> spectral(torch.eye(2).repeat(3, 3), sizes=(2, 2, 2)).effective_rank.round(decimals=4)
        tensor(2.)
    """
    parts = sizes_of(matrix, None, sizes, "spectral")
    total, concepts = sum(parts), min(parts)
    # The matrix is symmetric, so |eigenvalues| are its singular values.
    values = torch.linalg.eigvalsh(exact(matrix).detach()).abs().sort(dim=-1, descending=True).values
    norm = values.sum(dim=-1)
    squared = values.square().sum(dim=-1)
    rank = norm.square() / squared.masked_fill(squared == 0, 1.0)
    return Spectral(
        ((total - rank) / (total - concepts)).clamp(0.0, 1.0), rank, norm / total - 1,
        values[..., :concepts].sum(dim=-1) / total,
    )  # fmt: skip


def ideal_spectrum(sizes: Sequence[int]) -> list[float]:
    """Returns the singular values of consistent hard maps: N per shared concept, 1 per unmatched token, then 0.

    Example:
        >>> ideal_spectrum((2, 3))
        [2.0, 2.0, 1.0, 0.0, 0.0]
    """
    total, shared, count = sum(sizes), min(sizes, default=0), len(sizes)
    alone = total - count * shared
    return [float(count)] * shared + [1.0] * alone + [0.0] * (total - shared - alone)


def _check_diagonal(matrix: Tensor, sizes: Sequence[int]) -> None:
    if torch.compiler.is_compiling():
        return
    with torch.no_grad():
        blocks = split_blocks(matrix, sizes)
        for number, size in enumerate(sizes):
            block = exact(blocks[number][number])
            eye = torch.eye(size, dtype=block.dtype, device=block.device)
            # Rows of padding are zero, also on the diagonal.
            if not bool(((block - eye * (block.diagonal(dim1=-2, dim2=-1)[..., None] != 0)).abs() < 1e-3).all()):
                warnings.warn(
                    "consistency_score: the diagonal blocks are not the identity; r* may fall below the number of "
                    "concepts, and the score is clamped to 1.", stacklevel=3,
                )  # fmt: skip
                return
