"""Supermatrix of pairwise maps: one block per pair of modalities, one row and column per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError
from ..tokens.masks import at_least_float32 as exact
from ..tokens.masks import bool_mask, full_precision, zero_masked
from .matching_matrix import soft_matching

Diagonal = Literal["identity", "given"]
Blocks = Sequence[Sequence[Tensor | None]] | Mapping[tuple[int, int], Tensor] | Mapping[tuple[str, str], Tensor]


def supermatrix(
    blocks: Blocks, *, names: Sequence[str] | None = None, diagonal: Diagonal = "identity", symmetrize: bool = False
) -> Float[Tensor, "... size size"]:
    """Builds the supermatrix P, whose block (i, j) maps tokens of modality i (rows) to tokens of modality j (columns).

    Maps are consistent if P_ij P_jk = P_ik for all i, j, k; for permutations, if rank P = M, the number of concepts.

    Args:
        blocks: (..., M_i, M_j) maps, as rows of blocks or as {(i, j): map} with indices or names. A missing map (i, j)
            is the transpose of (j, i).
        names: order of the modalities if blocks are given by name; default is the order of first occurrence.
        diagonal: ``"identity"`` for I, or ``"given"`` for the blocks (i, i).
        symmetrize: return (P + P^T) / 2, as required by the spectral scores.

    Raises:
        ConfigError: both maps of a pair are missing, or a name is unknown. ShapeError: the sizes of maps do not match,
            or there is no map. NonFiniteError: a map contains NaN or infinity.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> supermatrix({("audio", "video"): swap})
        tensor([[1., 0., 0., 1.],
                [0., 1., 1., 0.],
                [0., 1., 1., 0.],
                [1., 0., 0., 1.]])
    """
    if diagonal not in ("identity", "given"):
        raise ConfigError("supermatrix diagonal", expected="'identity' or 'given'", got=repr(diagonal))
    numbered, order = _numbered(blocks, names)
    count = len(order)
    if count < 2:
        raise ConfigError("supermatrix", expected="maps between two or more modalities", got=f"{count}")
    for i in range(count):
        for j in range(count):
            if (i, j) not in numbered and (j, i) in numbered:
                numbered[i, j] = numbered[j, i].transpose(-1, -2)
    sizes = _sizes(numbered, order)
    like = next(iter(numbered.values()))
    rows = []
    for i in range(count):
        row = []
        for j in range(count):
            if i == j and diagonal == "identity":
                row.append(torch.eye(sizes[i], dtype=like.dtype, device=like.device))
            elif (i, j) in numbered:
                row.append(numbered[i, j])
            else:
                raise ConfigError(
                    "supermatrix", expected="a map in at least one direction for every pair",
                    got=f"none between '{order[i]}' and '{order[j]}'",
                    fix="Add a map between them, or omit one of the two modalities.",
                )  # fmt: skip
        rows.append(row)
    lead = torch.broadcast_shapes(*(part.shape[:-2] for row in rows for part in row))
    matrix = torch.cat([torch.cat([p.expand(*lead, *p.shape[-2:]) for p in row], dim=-1) for row in rows], dim=-2)
    return (matrix + matrix.transpose(-1, -2)) / 2 if symmetrize else matrix


def supermatrix_from_tokens(
    tokens: Sequence[Float[Tensor, "... token dim"]],
    *,
    temperature: float | None = None,
    masks: Sequence[Bool[Tensor, "... token"] | None] | None = None,
    sinkhorn: int = 0,
    dustbin: float | None = None,
    symmetrize: bool = True,
) -> Float[Tensor, "... size size"]:
    """Builds the supermatrix from token similarities: P_ij = softmax over the tokens of j of t_i t_j^T / temperature.

    Args:
        tokens: one (..., M_i, d) per modality.
        temperature: default is sqrt(d), as in attention.
        masks: one per modality, True for valid tokens; rows and columns of others are 0, including the diagonal, and
            their values have no influence, even if they are NaN.
        sinkhorn: number of Sinkhorn iterations, which make maps doubly stochastic (for equal numbers of tokens); 0 uses
            a softmax over rows.
        dustbin: logit of an additional row and column for unmatched tokens, which are removed from the result.
        symmetrize: return (P + P^T) / 2.

    Raises:
        ShapeError: the widths differ, or all tokens of a sample are padding in every modality.
    """
    if len({part.shape[-1] for part in tokens}) != 1:
        raise ShapeError(
            "supermatrix_from_tokens", expected="tokens of equal width",
            got=f"widths {[part.shape[-1] for part in tokens]}", fix="Project them to a shared space first.",
        )  # fmt: skip
    scale = tokens[0].shape[-1] ** 0.5 if temperature is None else temperature
    masks = [None] * len(tokens) if masks is None else list(masks)
    for part, mask in zip(tokens, masks, strict=True):
        if mask is not None:
            expected = f"a boolean mask (..., token) = {tuple(part.shape[:-1])}"
            bool_mask(mask, "supermatrix_from_tokens masks", expected, shape=part.shape[:-1])
    tokens = [zero_masked(part, mask) for part, mask in zip(tokens, masks, strict=True)]
    if all(mask is not None for mask in masks):
        some = torch.stack([mask.any(dim=-1) for mask in masks if mask is not None]).any(dim=0)
        if not bool(some.all()):
            raise ShapeError(
                "supermatrix_from_tokens", expected="a valid token in every sample", got="a sample of padding alone"
            )
    blocks = {}
    for i, (one, rows) in enumerate(zip(tokens, masks, strict=True)):
        for j, (other, columns) in enumerate(zip(tokens, masks, strict=True)):
            if i == j:
                eye = torch.eye(one.shape[-2], dtype=exact(one).dtype, device=one.device)
                blocks[i, j] = eye if rows is None else eye * rows[..., None, :]
            else:
                with full_precision(one):
                    scores = exact(one) @ exact(other).transpose(-1, -2) / scale
                blocks[i, j] = soft_matching(scores, rows=rows, columns=columns, sinkhorn=sinkhorn, dustbin=dustbin)
    return supermatrix(blocks, diagonal="given", symmetrize=symmetrize)


def supermatrix_from_attention(
    attention: Float[Tensor, "... token token"],
    modality: Int[Tensor, " token"],
    num_modalities: int | None = None,
    *,
    symmetrize: bool = True,
) -> Float[Tensor, "... size size"]:
    """Builds the supermatrix from joint attention: rows of each block (i, j) are normalized; I on the diagonal.

    Special tokens (-1) are excluded. Rows of tokens without attention to a modality are zero.

    Raises:
        ShapeError: attention is not square, or the labels do not match it.
    """
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2] or modality.shape != attention.shape[-1:]:
        raise ShapeError(
            "supermatrix_from_attention", expected="attention (..., token, token) and modality (token,)",
            got=f"{tuple(attention.shape)} and {tuple(modality.shape)}",
        )  # fmt: skip
    count = int(modality.max()) + 1 if num_modalities is None else num_modalities
    places = [torch.nonzero(modality == number).flatten() for number in range(count)]
    if any(len(indices) == 0 for indices in places):
        raise ShapeError("supermatrix_from_attention", expected="tokens of every modality", got="one without any")
    blocks = {}
    for i, rows in enumerate(places):
        for j, columns in enumerate(places):
            if i != j:
                part = exact(attention).index_select(-2, rows).index_select(-1, columns)
                total = part.sum(dim=-1, keepdim=True)
                blocks[i, j] = part / total.masked_fill(total == 0, 1.0)
    return supermatrix(blocks, symmetrize=symmetrize)


def _numbered(blocks: Blocks, names: Sequence[str] | None) -> tuple[dict[tuple[int, int], Tensor], list[str]]:
    if not isinstance(blocks, Mapping):
        rows = [list(row) for row in blocks]
        if any(len(row) != len(rows) for row in rows):
            raise ShapeError(
                "supermatrix", expected=f"{len(rows)} rows of {len(rows)} blocks",
                got=f"rows of {[len(row) for row in rows]}",
            )  # fmt: skip
        pairs = {(i, j): part for i, row in enumerate(rows) for j, part in enumerate(row) if part is not None}
        order = [str(number) for number in range(len(rows))] if names is None else list(names)
    else:
        keys = list(dict.fromkeys(key for pair in blocks for key in pair))
        if all(isinstance(key, int) for key in keys):
            keys = list(range(max(keys, default=-1) + 1))  # type: ignore[type-var]
        order = [str(key) for key in keys] if names is None else list(names)
        index = {key: number for number, key in enumerate(keys if names is None else names)}
        unknown = [key for key in keys if key not in index]
        if unknown:
            raise ConfigError("supermatrix names", expected=f"the modalities {keys}", got=f"none called {unknown[0]!r}")
        pairs = {(index[i], index[j]): part for (i, j), part in blocks.items()}  # type: ignore[index]
    for (i, j), part in pairs.items():
        where = f"supermatrix block ({order[i]}, {order[j]})"
        if not isinstance(part, Tensor) or part.ndim < 2 or not part.is_floating_point():
            got = f"shape {tuple(part.shape)}, {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise ShapeError(where, expected="a floating map (..., M_i, M_j)", got=got)
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(where, expected="finite numbers", got="NaN or infinity")
    if not pairs:
        raise ShapeError("supermatrix", expected="at least one map", got="none")
    return pairs, order


def _sizes(blocks: Mapping[tuple[int, int], Tensor], order: Sequence[str]) -> list[int]:
    sizes: dict[int, int] = {}
    for (i, j), part in blocks.items():
        for number, size in ((i, part.shape[-2]), (j, part.shape[-1])):
            if sizes.setdefault(number, size) != size:
                raise ShapeError(
                    f"supermatrix block ({order[i]}, {order[j]})",
                    expected=f"{sizes[number]} tokens of '{order[number]}', as in its other maps", got=f"{size}",
                )  # fmt: skip
    missing = [order[number] for number in range(len(order)) if number not in sizes]
    if missing:
        raise ConfigError("supermatrix", expected="a map to or from every modality", got=f"none of '{missing[0]}'")
    return [sizes[number] for number in range(len(order))]
