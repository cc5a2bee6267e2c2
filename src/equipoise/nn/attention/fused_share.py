"""Attention with the exact share of every modality, computed by fused kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attention_arguments import apply_autocast_dtype, check_heads, check_modality, mask_to_bias, without_hidden
from .key_layout import GRAIN, modality_one_hot, plan_segments
from .sdpa_kernels import HeadTensor, kernel_for
from .segments import SegmentedAttention

FEW_QUERIES = 32
"""Number of queries up to which the attention matrix is built explicitly, since it is no larger than the keys."""


class Attended(NamedTuple):
    """Result of `attend`.

    Attributes:
        output: (batch, head, query, dim) weighted values.
        share: (batch, head, query, modality) sum of each query's attention weights over the keys of each modality, in
            float32 or higher precision; None without labels.
    """

    output: Float[Tensor, "batch head query dim"]
    share: Float[Tensor, "batch head query modality"] | None


def attend(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch key_head key width"],
    value: Float[Tensor, "batch key_head key dim"],
    *,
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"] | None = None,
    num_modalities: int | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Attended:
    """Computes scaled dot-product attention and the share of attention that each modality receives.

    output_i = sum_j A_ij v_j and share_i^m = sum_{j in m} A_ij with A = softmax(scale q k^T + mask).

    The attention matrix is not materialized: the fused kernel runs once per modality, and the log-sum-exps of the parts
    give the shares, so the cost is close to plain attention. Both results are differentiable once with respect to
    query, key and value; second derivatives are not supported.

    Args:
        query: (batch, head, query, width).
        key: (batch, key head, key, width). With fewer heads than the query (grouped-query attention), query head h uses
            key head h // (head / key head).
        value: (batch, key head, key, dim); dim may differ from width.
        modality: label of every key, (key,) or (batch, key), in blocks or interleaved; -1 = special (class token,
            padding), not counted in any column. Labels on the CPU avoid a GPU sync.
        num_modalities: columns of the share; default is the highest label + 1, which requires a GPU sync.
        mask: boolean, True = attend, or floating, added to the scores (the lowest number of its type is treated as
            minus infinity). (batch, key), (batch, query, key), or broadcastable to (batch, head, query, key).
            A (query, key) mask would be ambiguous if both sizes are equal; pass it as mask[None, None].
        is_causal: query i attends to keys 0..i, aligned at the first key also if there are more keys than queries, as
            in `F.scaled_dot_product_attention`. Applies together with the mask.
        scale: factor of the scores; default 1 / sqrt(width).
        dropout: dropout probability of the attention weights. The share is computed without dropout.

    Returns:
        Attended(output, share). For a query without visible keys, output, share and gradient are 0. Keys and values
        that are masked for every query have no influence, even if they are NaN or infinite. Otherwise the columns of
        the share and the weight of the special keys sum to 1. A high attention share does not prove that a modality is
        used: values may be small or cancel out; confirm it with a causal test.

    Raises:
        ShapeError: ranks, sizes or types are incompatible, or labels are out of range.

    Example:
        >>> query, key, value = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
        >>> attend(query, key, value, modality=torch.tensor([-1, 0, 1, 1])).share
        tensor([[[[0.2500, 0.5000]]]])
    """
    query, key, value = apply_autocast_dtype(query, key, value)
    check_heads(query, key, value, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else mask_to_bias(mask, query, key)
    key, value = without_hidden(query, key, value, bias, is_causal)
    if modality is None:
        return Attended(_fused(query, key, value, bias, is_causal, scale, dropout), None)
    num_modalities = check_modality(modality, num_modalities, query, key)
    with torch.autocast(query.device.type, enabled=False):
        return _attend(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)


def shares(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch key_head key width"],
    *,
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"],
    num_modalities: int | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch head query modality"]:
    """Computes the share without the output; arguments and errors as for ``attend``.

    Example:
        >>> query, key = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
        >>> shares(query, key, modality=torch.tensor([-1, 0, 1, 1]))
        tensor([[[[0.2500, 0.5000]]]])
    """
    check_heads(query, key, key, 0.0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else mask_to_bias(mask, query, key)
    key, _ = without_hidden(query, key, key, bias, is_causal)
    num_modalities = check_modality(modality, num_modalities, query, key)
    with torch.autocast(query.device.type, enabled=False):
        # The kernels require values; pass the keys.
        result = _in_one_pass(query, key, key, modality, num_modalities, bias, is_causal, scale, 0.0)
        if result is not None:
            return result.share  # type: ignore[return-value]
        return _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale)


def _attend(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """Selects the cheapest of three exact algorithms."""
    result = _in_one_pass(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)
    if result is not None:
        return result
    return _two_passes(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)


def _two_passes(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """Uses public functions only: attention with one-hot values gives the shares."""
    output = _fused(query, key, value, bias, is_causal, scale, dropout)
    return Attended(output, _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale))


def _in_one_pass(
    query, key, value, modality, num_modalities, bias, is_causal, scale, dropout
) -> Attended | None:  # fmt: skip
    """Computes output and share together, explicitly for few queries, else by segments; None if neither applies."""
    rows, keys = query.shape[2], key.shape[2]
    # On CPUs there is no fused kernel with dropout.
    drops_on_cpu = dropout > 0 and query.device.type == "cpu"
    if rows <= FEW_QUERIES or 0 in (keys, *query.shape[:2]) or drops_on_cpu:
        return _explicit(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)
    kernel = kernel_for(query.device, query.dtype)
    if kernel is None or dropout > 0 or (bias is not None and bias.requires_grad):
        return None
    work = query.shape[1] * rows * keys * query.shape[-1]
    grain = GRAIN if query.device.type == "cpu" and query.dtype.itemsize >= 4 else 1
    groups = plan_segments(modality, bias, is_causal=is_causal, sample_work=work, grain=grain)
    if groups is None:
        return None
    output, share, _ = SegmentedAttention.apply(
        query, key, value, bias, modality.to(query.device), groups, num_modalities, kernel, is_causal, scale
    )
    return Attended(output, share)


def _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale) -> Tensor:
    """Computes the share as attention with one-hot values."""
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key, bias = query.to(exact), key.to(exact), None if bias is None else bias.to(exact)
    hot = modality_one_hot(modality, num_modalities, query).expand(*key.shape[:3], -1)
    # More columns than the head width would require wider keys, so they are computed in another pass.
    passes = hot.split(max(query.shape[-1], 8), dim=-1)
    return torch.cat([_fused(query, key, columns, bias, is_causal, scale, 0.0) for columns in passes], dim=-1)


def _fused(query, key, value, bias, is_causal, scale, dropout) -> Float[Tensor, "batch head query dim"]:
    """Calls `F.scaled_dot_product_attention` with grouped heads, unequal widths, masks or rows without visible keys."""
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    dim = value.shape[-1]
    if dim != query.shape[-1]:
        width = max(dim, query.shape[-1])
        query, key, value = (F.pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
    if bias is None and key.shape[2] > 0:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout)
        return output[..., :dim]
    if bias is None:
        return query @ key.transpose(-1, -2) @ value[..., :dim]
    if is_causal:
        bias = bias.masked_fill(~_past(query, key), -math.inf)
    blind = (bias == -math.inf).all(-1, keepdim=True)
    # Backends differ for rows without visible keys: unmask these rows, then set their output to zero.
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(blind, 0.0), scale=scale, dropout_p=dropout
    )
    return output[..., :dim].masked_fill(blind, 0.0)


def _explicit(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """Materializes the attention matrix."""
    exact = torch.promote_types(query.dtype, torch.float32)
    key_heads, heads = key.shape[1], query.shape[1]
    # Stack query heads that share a key head as rows, so that keys are not copied.
    stacked = query.to(exact).unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    scores = scale * stacked @ key.to(exact).transpose(-1, -2)
    scores = scores.view(*query.shape[:3], key.shape[2])
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(~_past(query, key), -math.inf)
    blind = None if bias is None else (scores == -math.inf).all(-1, keepdim=True)
    if blind is not None:
        scores = scores.masked_fill(blind, 0.0)
    attention = scores.softmax(-1)
    if blind is not None:
        attention = attention.masked_fill(blind, 0.0)
    share = attention @ modality_one_hot(modality, num_modalities, attention)
    after_dropout = F.dropout(attention, dropout).unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    output = (after_dropout @ value.to(exact)).view(*query.shape[:3], value.shape[-1])
    return Attended(output.to(query.dtype), share)


def _past(query: HeadTensor, key: HeadTensor) -> Bool[Tensor, "query key"]:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
