"""Incremental bases, so that each key is aligned with preceding keys only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .modality_bases import BasisKind, Moments, normed_bases, unit_keys

CHUNK = 16
"""Number of keys for which bases are kept in memory."""


def running_bases(
    maps_of: Callable[[Tensor], Tensor], kind: BasisKind, key: Tensor, value: Tensor, labels: Int[Tensor, "#batch key"],
    mask: Bool[Tensor, "batch key"] | None, state: Moments | None,
) -> tuple[Tensor, Moments]:  # fmt: skip
    """Maps every key with the bases of the keys up to it; also returns the sums over all keys.

    Bases are recomputed in the backward pass to save memory: there is one per key and modality.
    """
    batch, heads, length, width = key.shape
    labels = labels.expand(batch, -1)
    labels = labels if mask is None else labels.masked_fill(~mask.to(labels.device), -1)
    if state is None:
        exact = {"dtype": torch.promote_types(key.dtype, torch.float32), "device": key.device}
        shape = (batch, kind.num_modalities, heads, width)
        state = Moments(
            torch.zeros(*shape, width, **exact), torch.zeros(shape, **exact), torch.zeros(shape[:2], **exact)
        )
    parts = []
    for start in range(0, length, CHUNK):
        chunk = slice(start, start + CHUNK)
        inputs = (maps_of, kind, key[:, :, chunk], value[:, :, chunk], labels[:, chunk], *state)
        if torch.is_grad_enabled():
            part, *sums = checkpoint(_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            part, *sums = _chunk(*inputs)
        parts.append(part)
        state = Moments(*sums)
    return torch.cat(parts, dim=2) if parts else key, state


def _chunk(maps_of, kind: BasisKind, key, value, labels, product, total, count) -> tuple[Tensor, ...]:
    unit = unit_keys(key, kind.normalize_keys)
    other = value.to(unit.dtype) if kind.basis == "key_value" else unit
    mine = labels[..., None] == torch.arange(kind.num_modalities, device=labels.device)
    # (batch, key, modality, head, ...)
    unit, other = (x.transpose(1, 2)[:, :, None] for x in (unit, other))
    chosen = mine[..., None, None]
    products = (unit[..., None] * other[..., None, :]).masked_fill(~chosen[..., None], 0.0).cumsum(1) + product[:, None]
    totals = unit.masked_fill(~chosen, 0.0).cumsum(1) + total[:, None]
    counts = mine.to(product.dtype).cumsum(1) + count[:, None]
    maps = maps_of(normed_bases(Moments(products, totals, counts), kind))
    aligned = key
    for direction, label in enumerate(kind.directions):
        mapped = torch.einsum("bhki,bkhij->bhkj", key, maps[:, :, direction].to(key.dtype))
        aligned = torch.where((labels == label)[:, None, :, None], mapped, aligned)
    return aligned, products[:, -1], totals[:, -1], counts[:, -1]
