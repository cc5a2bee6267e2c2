"""Self-modality and cross-modality attention with their log-sum-exps, computed by fused kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .fused_share import FEW_QUERIES
from .modality_blocks import Blocks, blocks_of, into_blocks, out_of_blocks
from .sdpa_kernels import Bias, HeadTensor, Kernel, kernel_for
from .segments import _one_width, _seeing, _widen


class Part(NamedTuple):
    """Attention to a subset of the keys.

    Attributes:
        output: (batch, head, query, dim), zero for queries without visible keys.
        lse: (batch, head, query) log-sum-exp of the scores, minus infinity for queries without
            visible keys.
    """

    output: HeadTensor
    lse: Float[Tensor, "batch head query"]


class Sides(NamedTuple):
    """Labels and masks of queries and keys.

    Attributes:
        keys, queries: (token,) or (batch, token) labels.
        same: queries and keys are the same tokens.
        valid: (batch, key) False for keys that are masked for every query; None if all are visible.
        bias: added to the scores.
        is_causal: query i attends to keys 0..offset + i.
        offset: position of the first query among the keys.
    """

    keys: Int[Tensor, "... key"]
    queries: Int[Tensor, "... query"]
    same: bool
    valid: Bool[Tensor, "batch key"] | None
    bias: Bias | None
    is_causal: bool
    offset: int


def own_and_cross(
    query: HeadTensor, key: HeadTensor, value: HeadTensor, sides: Sides, scale: float, dropout: float
) -> tuple[Part, Part]:
    """Computes the attention of each query to its own modality (none for special queries) and to all other keys."""
    kernel = None if query.shape[2] <= FEW_QUERIES else kernel_for(query.device, query.dtype)
    learned_bias = sides.bias is not None and sides.bias.requires_grad
    if kernel is None or dropout > 0 or learned_bias or 0 in (key.shape[2], *query.shape[:2]):
        return _explicit(query, key, value, sides, scale, dropout)
    keys = blocks_of(sides.keys, sides.valid, key.device)
    rows = keys if sides.same else blocks_of(sides.queries, None, key.device)
    bias = None if sides.bias is None else _sorted_bias(sides.bias, rows, keys)
    k, v, b = into_blocks(key, keys), into_blocks(value, keys), _bias_blocks(bias, rows, keys, query.dtype)
    own, cross = [], []
    for r, (label, q) in enumerate(zip(rows.labels, into_blocks(query, rows), strict=True)):
        mine = [n for n, other in enumerate(keys.labels) if other == label >= 0]
        others = [n for n in range(len(keys.labels)) if n not in mine]
        for parts, chosen in ((own, mine), (cross, others)):
            visible = [n for n in chosen if not _all_later(sides, rows, keys, r, n)]
            triangle = sides.is_causal and sides.same and sides.offset == 0 and visible == [r] and label >= 0
            extra = None if triangle else _causal_bias(sides, rows, keys, r, visible, q)
            part_k, part_v = _joined(k, visible), _joined(v, visible)
            given = None if b is None or not visible else torch.cat([b[r][n] for n in visible], dim=3)
            total = given if extra is None else extra if given is None else given + extra
            parts.append(_part(kernel, q, part_k, part_v, total, triangle, scale))
    return tuple(
        Part(out_of_blocks([part.output for part in parts], rows),
             out_of_blocks([part.lse[..., None] for part in parts], rows)[..., 0])
        for parts in (own, cross)
    )  # type: ignore[return-value]  # fmt: skip


def _joined(parts: tuple[HeadTensor, ...], chosen: list[int]) -> HeadTensor:
    if len(chosen) < 2:
        return parts[chosen[0]] if chosen else parts[0][:, :, :0]
    return torch.cat([parts[n] for n in chosen], dim=2)


def _part(kernel: Kernel, query, key, value, bias: Bias | None, is_causal: bool, scale: float) -> Part:
    if key.shape[2] == 0:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        return Part(output, torch.full(query.shape[:3], -math.inf, dtype=exact, device=query.device))
    return Part(*PartAttention.apply(query, key, value, bias, kernel, is_causal, scale))  # type: ignore[misc]


class PartAttention(torch.autograd.Function):
    """Computes (output, log-sum-exp), both differentiable once.

    The kernel's backward pass takes dS_ij = A_ij (g_i . v_j - g_i . o_i). The gradient e_i of the log-sum-exp adds
    A_ij e_i, which an additional column adds: 1 in g, -e_i in o, 0 in v.
    """

    @staticmethod
    def forward(query, key, value, bias, kernel, is_causal, scale):
        output, lse = kernel.forward(*_one_width(query, key, value), bias, is_causal, scale)
        output = output[..., : value.shape[-1]]
        if bias is not None:
            blind = ~_seeing(bias, is_causal, query.shape[2])
            output, lse = output.masked_fill(blind, 0.0), lse.masked_fill(blind[..., 0], -math.inf)
        return output, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, bias, ctx.kernel, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, bias, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse):
        query, key, value, bias, output, lse = ctx.saved_tensors
        if grad_output is None and grad_lse is None:
            return (None,) * 7
        grad = torch.zeros_like(output) if grad_output is None else grad_output
        dim, v = value.shape[-1], value
        if grad_lse is not None:
            column = grad_lse.to(grad.dtype)[..., None]
            grad = torch.cat([grad, torch.ones_like(column)], dim=-1)
            output, v = torch.cat([output, -column], dim=-1), F.pad(value, (0, 1))
        q, k, v = _one_width(query, key, v)
        grad, output = _widen(grad, v.shape[-1]), _widen(output, v.shape[-1])
        # Scores of rows without visible keys are minus infinity; any finite number makes their weights zero.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        gradients = ctx.kernel.backward(grad, q, k, v, output, lse, bias, ctx.is_causal, ctx.scale)
        sizes = (query.shape[-1], key.shape[-1], dim)
        return *(g[..., :size] for g, size in zip(gradients, sizes, strict=True)), *(None,) * 4


def _all_later(sides: Sides, rows: Blocks, keys: Blocks, r: int, n: int) -> bool:
    """Returns whether causality masks a whole block of keys for a whole block of queries."""
    if not (sides.is_causal and rows.order is None and keys.order is None):
        return False
    return sum(keys.lengths[:n]) > sides.offset + sum(rows.lengths[: r + 1]) - 1


def _causal_bias(sides: Sides, rows: Blocks, keys: Blocks, r: int, visible: list[int], query) -> Bias | None:
    """Returns a bias of minus infinity for keys after the query."""
    if not sides.is_causal or not visible:
        return None
    places = rows.places(query.device).split(rows.lengths, dim=1)[r] + sides.offset
    others = keys.places(query.device).split(keys.lengths, dim=1)
    others = torch.cat([others[n] for n in visible], dim=1)
    if len(places) == len(others) == 1 and rows.order is None and keys.order is None:
        last = sum(keys.lengths[: visible[-1] + 1]) - 1
        if last <= sum(rows.lengths[:r]) + sides.offset:
            return None
    later = others[:, None, None, :] > places[:, None, :, None]
    return torch.zeros(later.shape, dtype=query.dtype, device=query.device).masked_fill_(later, -math.inf)


def _sorted_bias(bias: Bias, rows: Blocks, keys: Blocks) -> Bias:
    for blocks, dim in ((keys, 3), (rows, 2)):
        if blocks.order is None or (bias.shape[dim] == 1 and dim == 2):
            continue
        if blocks.order.ndim == 1:
            bias = bias.index_select(dim, blocks.order)
            continue
        batch = len(blocks.order)
        index = blocks.order[:, None, None, :] if dim == 3 else blocks.order[:, None, :, None]
        shape = [batch, *bias.shape[1:]]
        shape[dim] = index.shape[dim]
        bias = bias.expand(batch, -1, -1, -1).gather(dim, index.expand(shape))
    return bias


def _bias_blocks(bias: Bias | None, rows: Blocks, keys: Blocks, dtype: torch.dtype) -> list[list[Bias]] | None:
    """Returns bias[r][n] of query block r and key block n, with padding positions masked."""
    if keys.real is not None:
        filled = keys.real[:, None, None, :]
        bias = torch.zeros(filled.shape, dtype=dtype, device=filled.device) if bias is None else bias
        bias = bias.masked_fill(~filled, -math.inf)
    if bias is None:
        return None
    wide = bias.split(rows.lengths, dim=2) if bias.shape[2] > 1 else [bias] * len(rows.lengths)
    return [list(part.split(keys.lengths, dim=3)) for part in wide]


def own_keys(sides: Sides, device: torch.device) -> Bool[Tensor, "#batch 1 query key"]:
    """Returns True where key and query have the same modality."""
    keys, queries = (x.to(device) if x.ndim == 2 else x.to(device)[None] for x in (sides.keys, sides.queries))
    return ((queries[:, :, None] == keys[:, None]) & (queries >= 0)[:, :, None])[:, None]


def _explicit(query, key, value, sides: Sides, scale: float, dropout: float) -> tuple[Part, Part]:
    """Computes both parts with an explicit attention matrix."""
    exact = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = (x.to(exact).repeat_interleave(group, 1) for x in (key, value))
    scores = scale * query.to(exact) @ key.transpose(-1, -2)
    if sides.bias is not None:
        scores = scores + sides.bias
    if sides.is_causal:
        places = sides.offset + torch.arange(query.shape[2], device=query.device)
        later = torch.arange(key.shape[2], device=query.device) > places[:, None]
        scores = scores.masked_fill(later, -math.inf)
    own = own_keys(sides, query.device)
    return tuple(_explicit_part(scores.masked_fill(~chosen, -math.inf), value, dropout, query.dtype)
                 for chosen in (own, ~own))  # type: ignore[return-value]  # fmt: skip


def _explicit_part(scores: Tensor, value: Tensor, dropout: float, dtype: torch.dtype) -> Part:
    blind = (scores == -math.inf).all(-1, keepdim=True)
    open_ = scores.masked_fill(blind, 0.0)
    attention = F.dropout(open_.softmax(-1).masked_fill(blind, 0.0), dropout)
    # The log-sum-exp over zero keys is already minus infinity.
    lse = open_.logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
    return Part((attention @ value).to(dtype), lse)
