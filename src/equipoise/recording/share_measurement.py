"""Computes attention shares from queries and keys without materializing the attention matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..nn.attention import shares
from .attention_call import AttentionCall

CHUNK = 256
"""Number of queries whose attention matrix is computed at once if no kernel supports the scores."""


class MeasuredShare(NamedTuple):
    """Attributes:
    share: (batch, head, query, modality).
    sink: (batch, head, query) attention on the sink, a virtual key; None without a sink.
    """

    share: Float[Tensor, "batch head query modality"]
    sink: Float[Tensor, "batch head query"] | None = None


def measure_share(call: AttentionCall, labels: Int[Tensor, "... key"], num_modalities: int) -> MeasuredShare:
    """Computes share_i^m = sum of A_ij over the keys j of modality m, exactly, for the attention before dropout.

    Keys with label -1 belong to no modality. A query without visible keys has share 0.
    """
    if call.attention is not None:
        share = _columns(call.attention, labels, num_modalities)
        # The rest of each row is the attention on the sink.
        sink = None if call.sinks is None else (1 - call.attention.to(share.dtype).sum(dim=-1)).clamp(min=0)
        return MeasuredShare(share, sink)
    if call.softcap is not None:
        parts = [
            measure_share(replace(call, attention=part, softcap=None), labels, num_modalities)
            for part in explicit_attention(call)
        ]
        sink = None if call.sinks is None else torch.cat([part.sink for part in parts], dim=2)  # type: ignore[misc]
        return MeasuredShare(torch.cat([part.share for part in parts], dim=2), sink)
    if call.sinks is None:
        share = shares(
            call.query, call.key, modality=labels, num_modalities=num_modalities,
            mask=call.mask, is_causal=call.is_causal, scale=call.scale,
        )  # fmt: skip
        return MeasuredShare(share)
    return _with_sink(call, labels, num_modalities)


def _with_sink(call: AttentionCall, labels: Tensor, num_modalities: int) -> MeasuredShare:
    """Adds the sink as a key: an extra feature contains its score, and an extra modality its share."""
    batch, heads, rows, _ = call.sizes
    width = call.query.shape[-1]
    scale = width**-0.5 if call.scale is None else call.scale
    score = (call.sinks.to(call.query.dtype) / scale).view(1, heads, 1, 1)  # type: ignore[union-attr]
    query = torch.cat([call.query, score.expand(batch, -1, rows, 1)], dim=-1)
    sink = F.pad(torch.zeros_like(call.key[:, :, :1]), (0, 1), value=1.0)
    key = torch.cat([sink, F.pad(call.key, (0, 1))], dim=2)
    labels = F.pad(labels, (1, 0), value=num_modalities)
    mask = call.mask
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    first = 0
    if call.is_causal:
        # Prepend a query, so that causal masking still includes each query's own key and the sink.
        query, first = torch.cat([query[:, :, :1], query], dim=2), 1
        if mask is not None and mask.shape[2] > 1:
            mask = torch.cat([mask[:, :, :1], mask], dim=2)
    share = shares(
        query, key, modality=labels, num_modalities=num_modalities + 1,
        mask=mask, is_causal=call.is_causal, scale=scale,
    )[:, :, first:]  # fmt: skip
    return MeasuredShare(share[..., :num_modalities], share[..., num_modalities])


def key_mass(call: AttentionCall, weight: Float[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
    """Computes the attention on each key, a weighted sum over queries, one chunk of the matrix at a time."""
    if call.attention is not None:
        return torch.einsum("bhqk,bq->bhk", call.attention.float(), weight)
    total, start = call.query.new_zeros(*call.sizes[:2], call.sizes[3], dtype=torch.float32), 0
    for part in explicit_attention(call):
        stop = start + part.shape[2]
        total += torch.einsum("bhqk,bq->bhk", part.float(), weight[:, start:stop])
        start = stop
    return total


def explicit_attention(call: AttentionCall) -> Iterator[Float[Tensor, "batch head some key"]]:
    """Yields the attention matrix in chunks of queries; with a sink, rows sum to less than 1."""
    if call.attention is not None:
        yield call.attention
        return
    exact = torch.promote_types(call.query.dtype, torch.float32)
    group = call.query.shape[1] // call.key.shape[1]
    key = call.key.to(exact).repeat_interleave(group, dim=1).transpose(-1, -2)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    rows, keys = call.sizes[2:]
    for start in range(0, rows, CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = scale * (call.query[:, :, chunk].to(exact) @ key)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.offsets is not None:
            scores = scores + call.offsets.by_key(chunk).to(exact)
        mask = call.mask
        if mask is not None:
            mask = mask[:, :, chunk] if mask.shape[2] > 1 else mask
            mask = torch.zeros_like(mask, dtype=exact).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else (
                mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
            )  # fmt: skip
            scores = scores + mask
        if call.is_causal:
            positions = torch.arange(start, start + scores.shape[2], device=scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(keys, device=scores.device) > positions, -math.inf)
        yield _softmax(scores, call.sinks)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and the sink, if there is one; rows without visible keys are 0."""
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def _columns(attention: Tensor, labels: Tensor, num_modalities: int) -> Tensor:
    exact = torch.promote_types(attention.dtype, torch.float32)
    columns = torch.arange(num_modalities, device=attention.device)
    hot = (labels.to(attention.device)[..., None] == columns).to(exact)
    return attention.to(exact) @ (hot[:, None] if hot.ndim == 3 else hot)


def attention_output(call: AttentionCall) -> Float[Tensor, "batch head query dim"]:
    """Computes the output of an attention call whose arguments were changed."""
    if call.attention is None and call.softcap is None and call.sinks is None:
        from ..nn.attention import attend

        one = call.is_causal and call.mask is not None and call.mask.shape[2] == 1
        # A single segment runs in a kernel that takes both; the public function would need the mask of all queries.
        segment = {"modality": torch.zeros(call.sizes[3], dtype=torch.long), "num_modalities": 1} if one else {}
        return attend(
            call.query, call.key, call.value, mask=call.mask, is_causal=call.is_causal, scale=call.scale, **segment
        ).output  # fmt: skip
    group = call.sizes[1] // call.value.shape[1]
    value = call.value.repeat_interleave(group, dim=1)
    parts = [part.to(value.dtype) @ value for part in explicit_attention(replace(call))]
    return torch.cat(parts, dim=2)
