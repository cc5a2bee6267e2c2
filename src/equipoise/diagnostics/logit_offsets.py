"""Adds offsets to the attention logits of groups of keys, without materializing the attention matrix."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..nn.attention.sdpa_kernels import kernel_for
from ..recording import AttentionCall
from ..recording.attention_call import KeyOffsets
from ..recording.share_measurement import measure_share

NEVER = -1000.0
"""Offset of keys that get no attention."""

SINK_MARGIN = 25.0
"""How much logits are raised to leave a sink with less than 1e-10 of the attention."""

ROUNDING = 1e-6
"""Shares whose sum is this close to 1 leave nothing for other keys."""

Members = Bool[Tensor, "batch group key"]


def add_offsets(call: AttentionCall, offsets: KeyOffsets) -> AttentionCall:
    """Returns the attention with s_ij + offset_ig in place of the score s_ij of each key j of group g.

    A' = softmax(s + offset). The offset is folded into the mask where that takes no more memory than the keys;
    elsewhere it is a product of additional features of queries and keys, so that fused kernels and causality remain.
    """
    if call.attention is not None:
        return replace(call, attention=_reweighted(call.attention, offsets))
    if call.softcap is not None:
        return replace(call, offsets=offsets)
    return _by_mask(call, offsets) if _fits_mask(call, offsets) else _by_features(call, offsets)


@torch.no_grad()
def offsets_for_shares(call: AttentionCall, members: Members, shares: Float[Tensor, " group"]) -> KeyOffsets:
    """Returns the offsets that give each group its share of the attention of each query.

    b_ig = log(t_g / s_ig) - log((1 - sum_h t_h) / (1 - sum_h s_ih)) for the present share s_ig. All other keys keep
    their proportions. Queries that see no key of a group, or no other key, keep the attention between the remaining
    groups.
    """
    count = len(shares)
    other = ~members.any(dim=1)
    labels = torch.where(other, count, members.to(torch.uint8).argmax(dim=1))
    measured = measure_share(call, labels, count + 1)
    own, rest = measured.share[..., :count], measured.share[..., count:]
    if measured.sink is not None:
        rest = rest + measured.sink[..., None]
    goal = torch.where(own > 0, shares.to(own), 0.0)
    left = 1 - goal.sum(dim=-1, keepdim=True)
    floor = torch.finfo(own.dtype).tiny
    offsets = goal.clamp(min=floor).log() - own.clamp(min=floor).log()
    if float(shares.sum()) < 1 - ROUNDING:
        present = (rest > 0) & (left > 0)
        offsets = offsets - torch.where(present, left.clamp(min=floor).log() - rest.clamp(min=floor).log(), 0.0)
        return KeyOffsets(members, offsets.masked_fill(own <= 0, 0.0))
    if measured.sink is not None:
        # The logit of the sink cannot be lowered, so all others are raised.
        offsets = offsets + SINK_MARGIN
    never = torch.where((own > 0).all(dim=-1, keepdim=True), NEVER, 0.0)
    partly = torch.where((own > 0).any(dim=-1, keepdim=True) & (never == 0) & (rest > 0),
                         rest.clamp(min=floor).log() - left.clamp(min=floor).log(), 0.0)  # fmt: skip
    offsets = (offsets + partly).masked_fill(own <= 0, 0.0)
    return KeyOffsets(torch.cat([members, other[:, None]], dim=1), torch.cat([offsets, never], dim=-1))


def _fits_mask(call: AttentionCall, offsets: KeyOffsets) -> bool:
    if call.is_causal:
        # Kernels that take a mask beside causality expand one row of it themselves.
        one_row = offsets.values.shape[2] == 1 and (call.mask is None or call.mask.shape[2] == 1)
        return one_row and kernel_for(call.query.device, call.query.dtype) is not None
    batch, _, _, keys = call.sizes
    shapes = [(batch, *offsets.values.shape[1:3], keys), *([] if call.mask is None else [tuple(call.mask.shape)])]
    present = 0 if call.mask is None else call.mask.numel()
    return math.prod(torch.broadcast_shapes(*shapes)) <= max(present, call.key.numel())


def _by_mask(call: AttentionCall, offsets: KeyOffsets) -> AttentionCall:
    return add_to_scores(call, offsets.by_key())


def add_to_scores(call: AttentionCall, added: Float[Tensor, "#batch #head #query key"]) -> AttentionCall:
    """Returns the attention with numbers added to its scores by the mask; masked keys remain masked."""
    exact = torch.promote_types(call.query.dtype, torch.float32)
    added = added.to(exact)
    if (mask := call.mask) is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
        added = (added if mask.dtype == torch.bool else added + mask.to(exact)).masked_fill(hidden, -math.inf)
    return replace(call, mask=added)


def _by_features(call: AttentionCall, offsets: KeyOffsets) -> AttentionCall:
    batch, heads, rows, _ = call.sizes
    width = call.query.shape[-1]
    scale = width**-0.5 if call.scale is None else call.scale
    device = call.query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else call.query.dtype
    parts = _split(offsets.values / scale, dtype)
    wider = [part.to(call.query.dtype).expand(batch, heads, rows, -1) for part in parts]
    hot = offsets.members.transpose(1, 2)[:, None].to(call.key.dtype).expand(-1, call.key.shape[1], -1, -1)
    # Kernels require widths that are multiples of 8.
    missing = -(width + len(parts) * hot.shape[-1]) % 8
    query, key = (
        torch.cat([wide, *more, wide.new_zeros(1).expand(*wide.shape[:3], missing)], dim=-1)
        for wide, more in ((call.query, wider), (call.key, [hot] * len(parts)))
    )
    return replace(call, query=query, key=key, scale=scale)


def _split(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Returns numbers of a dtype whose sum has float32 precision."""
    if dtype.itemsize >= 4:
        return [values]
    parts = []
    for _ in range(3):
        parts.append(values.to(dtype))
        values = values - parts[-1].to(values.dtype)
    return parts


def _reweighted(attention: Tensor, offsets: KeyOffsets) -> Tensor:
    exact = torch.promote_types(attention.dtype, torch.float32)
    gone = attention <= 0
    scores = attention.to(exact).clamp(min=torch.finfo(exact).tiny).log() + offsets.by_key().to(exact)
    empty = gone.all(dim=-1, keepdim=True)
    scores = scores.masked_fill(gone & ~empty, -math.inf)
    return scores.softmax(dim=-1).masked_fill(empty, 0.0).to(attention.dtype)
