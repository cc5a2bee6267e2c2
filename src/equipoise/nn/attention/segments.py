"""Attention output and shares in one pass over the keys, one segment per modality, at the cost of a fused kernel.

Each segment of keys yields an output o_s and a log-sum-exp l_s. With l = logsumexp_s l_s, the share of the segment is
exp(l_s - l), and the full output is the sum of exp(l_s - l) o_s. The backward pass needs no segments: the backward
kernel takes the merged output and l over all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .attention_arguments import is_none_true
from .key_layout import BorderKeys, Group, Run, modality_one_hot
from .sdpa_kernels import Bias, HeadTensor, Kernel

ROWS_PER_THREAD = 2048
"""Query rows processed per thread."""

TILES = 4
"""Number of tiles into which the rows are divided, to limit the memory of outputs that are not merged yet.

Threads synchronize between tiles."""


class Segment(NamedTuple):
    """Attention over one run of keys.

    Attributes:
        first: the first query that attends to a key of the run; earlier rows have no output.
        output: (batch, head, query - first, dim), zero for rows without visible keys.
        lse: (batch, head, query), minus infinity for rows without visible keys.
    """

    first: int
    output: HeadTensor
    lse: Float[Tensor, "batch head query"]


def segment_attention(
    kernel: Kernel,
    query: HeadTensor,
    key: HeadTensor,
    value: HeadTensor,
    runs: tuple[Run, ...],
    bias: Bias | None,
    is_causal: bool,
    scale: float,
) -> Iterator[Segment]:
    """Iterates over the attention within each run. Not differentiable."""
    return (_segment(kernel, query, key, value, run, bias, is_causal, scale) for run in runs)


def _segment(kernel, query, key, value, run: Run, bias, is_causal, scale) -> Segment:
    span = slice(run.start, run.stop)
    rows = query.shape[2]
    first = min(run.start, rows) if is_causal else 0
    if first == rows:
        return Segment(first, query[:, :, first:], _blank(query, -math.inf))
    if bias is not None:
        bias = bias[..., first if bias.shape[2] > 1 else 0 :, span]
    output, lse = kernel.forward(query[:, :, first:], key[:, :, span], value[:, :, span], bias, is_causal, scale)
    if bias is not None:
        blind = ~_seeing(bias, is_causal, rows - first)
        if not is_none_true(blind):
            output = output.masked_fill_(blind, 0.0)
            lse = lse.masked_fill(blind[..., 0], -math.inf)
    return Segment(first, output, F.pad(lse, (first, 0), value=-math.inf) if first else lse)


def _blank(query: HeadTensor, fill: float) -> Float[Tensor, "batch head query"]:
    """Creates a (batch, head, query) tensor in float32 or higher precision, in the memory layout of the kernels."""
    batch, heads, rows, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.full((batch, rows, heads), fill, dtype=dtype, device=query.device).transpose(1, 2)


def _seeing(bias: Bias, is_causal: bool, rows: int) -> Bool[Tensor, "#batch #head query 1"]:
    """Returns True for rows with at least one visible key."""
    open_ = bias != -math.inf
    if not is_causal:
        return open_.any(-1, keepdim=True)
    keys = bias.shape[-1]
    if bias.shape[2] > 1:
        past = torch.ones(rows, keys, dtype=torch.bool, device=bias.device).tril()
        return (open_ & past).any(-1, keepdim=True)
    # Row i attends to keys 0..i: it has a visible key if the first unmasked key is at or before i.
    last = torch.arange(rows, device=bias.device).clamp(max=keys - 1)
    return (open_.cumsum(-1) > 0)[..., 0, last][..., None]


class SegmentedAttention(torch.autograd.Function):
    """Computes (output, share, log-sum-exp); differentiable once.

    The backward kernel gives the gradient of the output. The share is attention with one-hot values, so the same kernel
    gives its gradient, with the one-hot columns concatenated to the values: dS_ij = A_ij (g_m(j) - sum_m share_im g_m).
    """

    @staticmethod
    def forward(query, key, value, bias, modality, groups, num_modalities, kernel, is_causal, scale):
        batch, heads, rows, _ = query.shape
        total = _blank(query, 0.0)
        share = total.new_zeros(batch, heads, rows, num_modalities)
        q, k, v = _one_width(query, key, value)
        if (run := _only_run(groups, key)) is not None:
            # Nothing to merge: the output of the kernel is the result.
            _, part, lse = _segment(kernel, q, k, v, run, bias, is_causal, scale)
            visible = lse != -math.inf
            if run.label >= 0:
                share[..., run.label] = visible
            return part[..., : value.shape[-1]], share, lse.masked_fill(~visible, 0.0)
        output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        for group in groups:
            samples = group.samples
            inputs = (q[samples], k[samples], v[samples], _of_samples(bias, samples), is_causal, scale)
            _attend_group(kernel, group, inputs, (output[samples], share[samples], total[samples]))
        return output, share, total

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, bias, modality, _, _, ctx.kernel, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, bias, modality, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_share, _):
        query, key, value, bias, modality, output, share, total = ctx.saved_tensors
        sides = [] if grad_output is None else [(value, output, grad_output)]
        if grad_share is not None:
            hot = modality_one_hot(modality, share.shape[-1], share).expand(*key.shape[:3], -1)
            sides.append((hot, share, grad_share))
        if not sides:
            return (None,) * 10
        # The share has float32 or higher precision, and so does the computation if its gradient is needed.
        dtype = sides[-1][1].dtype
        values, outputs, grads = (_concatenate(parts, dtype) for parts in zip(*sides, strict=True))
        q, k, v = _one_width(query.to(dtype), key.to(dtype), values)
        outputs, grads = _widen(outputs, v.shape[-1]), _widen(grads, v.shape[-1])
        bias = None if bias is None else bias.to(dtype)
        gradients = ctx.kernel.backward(grads, q, k, v, outputs, total, bias, ctx.is_causal, ctx.scale)
        grad_query, grad_key, grad_value = (
            grad[..., : source.shape[-1]].to(source.dtype)
            for grad, source in zip(gradients, (query, key, value), strict=True)
        )
        return grad_query, grad_key, None if grad_output is None else grad_value, *(None,) * 7


def _only_run(groups: Sequence[Group], key: HeadTensor) -> Run | None:
    """Returns the run of all keys if there is a single one."""
    if len(groups) > 1 or len(groups[0].runs) != 1 or groups[0].order is not None or groups[0].strays is not None:
        return None
    (run,) = groups[0].runs
    return run if (run.start, run.stop) == (0, key.shape[2]) and groups[0].samples == slice(None) else None


def _attend_group(kernel, group: Group, inputs, results) -> None:
    query, key, value, bias, is_causal, scale = inputs
    if group.order is not None:
        order = group.order.to(key.device)
        key, value = key.index_select(2, order), value.index_select(2, order)
        bias = None if bias is None else bias.index_select(3, order)
    for samples, heads, key_heads in _tiles(query, key):
        tile = (query[samples, heads], key[samples, key_heads], value[samples, key_heads])
        part = _of_samples(bias, samples)
        if part is not None and part.shape[1] > 1:
            part = part[:, heads]
        segments = segment_attention(kernel, *tile, group.runs, part, is_causal, scale)
        _merge(segments, group.runs, *(result[samples, heads] for result in results))
    if group.strays is not None:
        _correct_border_shares(group.strays, query, key, bias, is_causal, scale, *results[1:])


def _of_samples(bias: Bias | None, samples: slice) -> Bias | None:
    return bias if bias is None or bias.shape[0] == 1 else bias[samples]


def _tiles(query: HeadTensor, key: HeadTensor) -> Iterator[tuple[slice, slice, slice]]:
    """Divides (batch, head) into tiles that keep all threads busy; a single tile on GPUs."""
    batch, heads, rows, _ = query.shape
    key_heads = key.shape[1]
    group = heads // key_heads
    enough = batch * heads * rows
    if query.device.type == "cpu":
        enough = max(-(-enough // TILES), ROWS_PER_THREAD * torch.get_num_threads())
    step = min(key_heads, -(-enough // (group * rows)))
    samples = min(batch, -(-enough // (step * group * rows)))
    for b in range(0, batch, samples):
        for h in range(0, key_heads, step):
            yield slice(b, b + samples), slice(h * group, (h + step) * group), slice(h, h + step)


def _merge(segments: Iterator[Segment], runs: tuple[Run, ...], output, share, total) -> None:
    """Merges the segments into the output, the shares and the log-sum-exp over all keys.

    Segments are merged one by one, in place if the dtype allows, so that only one of them is in memory.
    """
    width = output.shape[-1]
    _, part, so_far = next(segments)
    merged = output if output.dtype == total.dtype else part[..., :width].to(total.dtype)
    if merged is output:
        output.copy_(part[..., :width])
    del part
    masses = [so_far]
    lowest = torch.finfo(total.dtype).min
    for start, part, lse in segments:
        masses.append(lse)
        # exp(lse) / (exp(so_far) + exp(lse)); clamped, since -inf - (-inf) is NaN.
        weight = lse.sub(so_far.clamp(min=lowest)).sigmoid_()[:, :, start:, None]
        merged[:, :, start:].lerp_(part[..., :width].to(total.dtype), weight)
        so_far = torch.logaddexp(so_far, lse)
        del part
    if merged is not output:
        output.copy_(merged)
    # For rows without visible keys, any finite number makes weights and gradients zero.
    total.copy_(so_far.masked_fill(so_far == -math.inf, 0.0))
    for run, lse in zip(runs, masses, strict=True):
        if run.label >= 0:
            share[..., run.label] += lse.sub(total).exp_()


def _correct_border_shares(strays: BorderKeys, query, key, bias, is_causal, scale, share, total) -> None:
    """Moves the attention to border keys from the modality of their run to their own modality."""
    keys = strays.keys.to(key.device)
    group = query.shape[1] // key.shape[1]
    chosen = scale * key.index_select(2, keys)
    scores = query.unflatten(1, (-1, group)).flatten(2, 3) @ chosen.transpose(-1, -2)
    scores = scores.view(*query.shape[:3], len(keys))
    if bias is not None:
        scores += bias.index_select(3, keys)
    attention = scores.sub_(total[..., None]).exp_()
    if is_causal:
        attention.mul_(torch.arange(query.shape[2], device=keys.device)[:, None] >= keys)
    key_labels, other = (
        modality_one_hot(labels, share.shape[-1], share) for labels in (strays.modality, strays.visited)
    )
    # Rounding errors could make very small shares negative.
    share.add_(attention @ (key_labels - other)).clamp_(min=0.0)


def _concatenate(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts], dim=-1)


def _one_width(query: HeadTensor, key: HeadTensor, value: HeadTensor) -> tuple[HeadTensor, HeadTensor, HeadTensor]:
    """Pads to a common width that is a multiple of 8, as kernels require; zeros change neither scores nor outputs."""
    width = max(query.shape[-1], value.shape[-1])
    width += -width % 8
    return _widen(query, width), _widen(key, width), _widen(value, width)


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
