"""Basis matrices of the keys of each modality (Gram, key-value, covariance) and their normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...tokens.masks import at_least_float32
from ..attention.modality_blocks import Blocks, into_blocks

Basis = Literal["gram", "key_value", "covariance"]
Norm = Literal["row", "fro", "spectral", "trace", "none"]


class BasisKind(NamedTuple):
    """Options of the bases; see `DuplexAligner`."""

    num_modalities: int
    directions: tuple[int, ...]
    basis: Basis = "gram"
    norm: Norm = "row"
    normalize_keys: bool = True


class Moments(NamedTuple):
    """Sums over the keys of each modality, in float32 or higher precision. Sums of disjoint sets of keys can be added.

    Attributes:
        product: (batch, modality, head, width, width), the sum of k^T k, or of k^T v.
        total: (batch, modality, head, width), the sum of k.
        count: (batch, modality) keys.
    """

    product: Float[Tensor, "batch modality head width width"]
    total: Float[Tensor, "batch modality head width"]
    count: Float[Tensor, "batch modality"]

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


def basis_of(
    key: Float[Tensor, "*batch key width"],
    value: Float[Tensor, "*batch key width"] | None = None,
    *,
    basis: Basis = "gram",
    norm: Norm = "row",
    normalize_keys: bool = True,
) -> Float[Tensor, "*batch width width"]:
    """Computes the normalized basis of the keys of one modality; there must be at least one key.

    Example:
        >>> basis_of(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 2.0]]), norm="none")
        tensor([[1., 0.],
                [0., 2.]])
    """
    unit = unit_keys(key, normalize_keys)
    other = unit if basis != "key_value" or value is None else value.to(unit.dtype)
    product, floor = unit.transpose(-1, -2) @ other, 0.0
    if basis == "covariance":
        floor = rounding(product)
        product = centered(product, unit.sum(-2), torch.tensor(float(key.shape[-2]), device=key.device))
    return unit_norm(product, norm, floor)


def unit_keys(key: Tensor, normalize: bool) -> Tensor:
    """Normalizes keys to length 1, in float32 or higher: long sums of half-precision products overflow."""
    key = at_least_float32(key)
    return F.normalize(key, dim=-1, eps=1e-6) if normalize else key


def centered(product: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Computes the sum of (k - mean)^T (k - mean)."""
    return product - total[..., :, None] * (total / count.clamp(min=1)[..., None])[..., None, :]


def rounding(product: Float[Tensor, "*batch width width"]) -> Float[Tensor, "*batch 1 1"]:
    """Bounds the rounding error left by centering equal keys, which must not be normalized to norm 1."""
    return 8 * torch.finfo(product.dtype).eps * product.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def unit_norm(
    matrix: Float[Tensor, "*batch width width"], norm: Norm, floor: Tensor | float = 0.0
) -> Float[Tensor, "*batch width width"]:
    """Divides a matrix by its norm; norms up to ``floor`` give zeros with gradient 0."""
    if norm == "none":
        return matrix
    if norm == "row":
        size = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    elif norm == "trace":
        size = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    else:
        size = torch.linalg.matrix_norm(matrix, ord="fro" if norm == "fro" else 2)[..., None, None]
    counts = size > floor
    return torch.where(counts, matrix / torch.where(counts, size, 1.0), 0.0)


def normed_bases(moments: Moments, kind: BasisKind) -> Float[Tensor, "*batch modality head width width"]:
    """Computes the normalized bases ||G^n||; the identity for modalities without keys."""
    product, floor = moments.product, 0.0
    if kind.basis == "covariance":
        floor = rounding(product)
        product = centered(product, moments.total, moments.count[..., None])
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return torch.where(moments.count[..., None, None, None] > 0, unit_norm(product, kind.norm, floor), eye)


def moments_of(
    kind: BasisKind, keys: Sequence[Tensor], values: Sequence[Tensor], blocks: Blocks, within: Tensor | None
) -> Moments:
    """Computes the sums over keys gathered in blocks.

    Args:
        kind: options of the bases.
        keys, values: one (batch, head, place, width) for each block.
        blocks: labels of the blocks.
        within: (batch, key) True for the keys to include; None for all.
    """
    batch, heads, _, width = keys[0].shape
    inside: Sequence[Bool[Tensor, "batch place"] | None] = [None] * len(keys)
    if within is not None:
        inside = [x[:, 0, :, 0] for x in into_blocks(within[:, None, :, None].to(keys[0].device), blocks)]
    if blocks.real is not None:
        real = blocks.real.split(blocks.lengths, dim=1)
        inside = [r if i is None else r & i for r, i in zip(real, inside, strict=True)]
    dtype = torch.promote_types(keys[0].dtype, torch.float32)
    zeros = {"dtype": dtype, "device": keys[0].device}
    moments: list[tuple[Tensor, Tensor, Tensor]] = []
    for label in range(kind.num_modalities):
        if label not in blocks.labels:
            shape = (batch, heads, width)
            moments.append(
                (torch.zeros(*shape, width, **zeros), torch.zeros(shape, **zeros), torch.zeros(batch, **zeros))
            )
            continue
        index = blocks.labels.index(label)
        chosen, unit = inside[index], unit_keys(keys[index], kind.normalize_keys)
        if chosen is not None:
            unit = unit.masked_fill(~chosen[:, None, :, None], 0.0)
        other = unit if kind.basis != "key_value" else values[index].to(dtype)
        if chosen is not None and kind.basis == "key_value":
            other = other.masked_fill(~chosen[:, None, :, None], 0.0)
        count = (
            torch.full((batch,), float(unit.shape[2]), **zeros)
            if chosen is None
            else chosen.sum(1).to(dtype).expand(batch)
        )
        moments.append((unit.transpose(-1, -2) @ other, unit.sum(2), count))
    return Moments(*(torch.stack(parts, dim=1) for parts in zip(*moments, strict=True)))
