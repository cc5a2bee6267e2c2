"""Pseudo-attention: masked keys receive part of the attention, with value 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError, unknown_name
from .sdpa_kernels import HeadTensor
from .self_cross_parts import Sides, own_keys

Count = Literal["causal", "all_masked"]


@dataclass(frozen=True, eq=False)
class PseudoAttention:
    """Options of pseudo-attention, which assigns pseudo scores to masked keys::

        p_ij = base - (j - 1) decay   for the j-th of the n_i masked keys of query i;    sum_j exp(p_ij) = exp(b_i):
        b_i = base + log((1 - exp(-decay n_i)) / (1 - exp(-decay))),   decay = 0: base + log n_i,   n_i = 0: -inf

    n_i is counted separately for each part.

    Args:
        decay: decrease of the pseudo score from one masked key to the next; the paper gives no value.
        base: the highest pseudo score, a number or a learnable tensor. Minus infinity is the ordinary mask.
        count: ``"causal"`` counts masked keys after the query, ``"all_masked"`` all masked keys. Padding is counted by
            the latter only.
        reference: number of keys of the complete sequence; future keys are assumed to have the modality of the last
            query. Without it, n_i depends on the current length, and decoding with a key-value cache differs from one
            pass over the complete sequence.

    Raises:
        ConfigError: decay is negative or infinite, or count is unknown.

    Reference: MODA (ICML 2025); StableMask (ICML 2024).

    Example:
        >>> pseudo_logit(torch.tensor([0, 6]), PseudoAttention(decay=0.7))
        tensor([  -inf, 0.6712])
    """

    decay: float = 1.0
    base: float | Tensor = 0.0
    count: Count = "causal"
    reference: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise ConfigError("PseudoAttention", expected="a finite decay >= 0", got=f"decay = {self.decay}")
        if self.count not in ("causal", "all_masked"):
            raise unknown_name("PseudoAttention", "count", str(self.count), ("causal", "all_masked"))


def pseudo_logit(
    hidden: Int[Tensor, ...], pseudo: PseudoAttention, dtype: torch.dtype = torch.float32
) -> Float[Tensor, ...]:
    """Computes b_i from the numbers of masked keys n_i; see ``PseudoAttention``."""
    n = hidden.to(dtype)
    if pseudo.decay == 0:
        return n.log() + pseudo.base
    return (-torch.expm1(-pseudo.decay * n)).log() - math.log(-math.expm1(-pseudo.decay)) + pseudo.base


def pseudo_logits(
    pseudo: PseudoAttention, sides: Sides, query: HeadTensor, key: HeadTensor
) -> tuple[Float[Tensor, "#batch #head query"], Float[Tensor, "#batch #head query"]]:
    """Computes the logits b_i of the own and the cross part."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    own, cross = hidden_keys(pseudo, sides, query, key)
    return pseudo_logit(own, pseudo, dtype), pseudo_logit(cross, pseudo, dtype)


def hidden_keys(
    pseudo: PseudoAttention, sides: Sides, query: HeadTensor, key: HeadTensor
) -> tuple[Int[Tensor, "#batch #head query"], Int[Tensor, "#batch #head query"]]:
    """Counts the masked keys of the own modality and of other modalities for each query."""
    by_row = sides.bias is not None and sides.bias.shape[2] > 1
    same_modality, all_ = (_by_matrix if by_row else _by_counting)(pseudo, sides, query, key)
    cross = all_ - same_modality
    missing = 0 if pseudo.reference is None else max(pseudo.reference - key.shape[2], 0)
    if missing:
        labels = _as_2d(sides.queries, query.device)
        same = (labels == labels[:, -1:]) & (labels >= 0)
        same_modality = same_modality + missing * same[:, None]
        cross = cross + missing * ~same[:, None]
    return same_modality, cross


def _by_matrix(pseudo, sides: Sides, query, key) -> tuple[Tensor, Tensor]:
    """Counts masked keys of a mask with a query dimension."""
    device = query.device
    places = (sides.offset + torch.arange(query.shape[2], device=device))[:, None]
    later = torch.arange(key.shape[2], device=device) > places
    hidden = sides.bias == -math.inf  # type: ignore[operator]
    if sides.is_causal:
        hidden = hidden | later
    if pseudo.count == "causal":
        hidden = hidden & later & sides.valid.to(device)[:, None, None]  # type: ignore[union-attr]
    return (hidden & own_keys(sides, device)).sum(-1), hidden.sum(-1).expand(hidden.shape[:3])


def _by_counting(pseudo, sides: Sides, query, key) -> tuple[Tensor, Tensor]:
    """Counts masked keys as all keys of a modality minus those up to the query."""
    device = query.device
    if key.shape[2] == 0:
        none = torch.zeros(1, 1, query.shape[2], dtype=torch.int64, device=device)
        return none, none
    keys, queries = _as_2d(sides.keys, device), _as_2d(sides.queries, device)
    real = torch.ones_like(keys, dtype=torch.bool) if sides.valid is None else sides.valid.to(device)
    batch = max(len(keys), len(queries), len(real))
    counted = torch.ones_like(real) if pseudo.count == "all_masked" else real
    number = int(torch.cat([keys.flatten(), queries.flatten()]).max()) + 1 if keys.numel() else 1
    # One column for each label and one for all keys.
    columns = torch.cat(
        [keys[..., None] == torch.arange(number, device=device), torch.ones_like(keys)[..., None] > 0], -1
    )
    columns = columns.expand(batch, -1, -1)
    total = (columns & counted[..., None]).sum(1, keepdim=True)
    counts = (columns & real[..., None]).cumsum(1)
    places = (sides.offset + torch.arange(query.shape[2], device=device)).clamp(max=key.shape[2] - 1)
    hidden = total - (counts[:, places] if sides.is_causal else counts[:, -1:].expand(-1, len(places), -1))
    label = queries.expand(batch, -1)
    same_modality = hidden.gather(2, label.clamp(min=0)[..., None])[..., 0].masked_fill(label < 0, 0)
    return same_modality[:, None], hidden[:, None, :, -1]


def _as_2d(labels: Tensor, device: torch.device) -> Int[Tensor, "#batch token"]:
    return labels.to(device) if labels.ndim == 2 else labels.to(device)[None]
