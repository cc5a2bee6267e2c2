"""Attention that says where it went: the output of fused kernels and the exact share of every modality."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ShapeError
from .kernels import Bias, HeadTensor, kernel_for
from .layout import GRAIN, one_hot, plan
from .segments import SegmentedAttention

FEW_QUERIES = 32
"""Up to so many queries (a class token is one) the attention matrix is no larger than the keys and cheap to build."""


class Attended(NamedTuple):
    """What `attend` returns.

    Attributes:
        output: (batch, head, query, dim) weighted values.
        share: (batch, head, query, modality) part of each query's attention that fell on each modality, in float32 or
            better; None when no modality was given.
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
    """Scaled dot-product attention, and how much of it each modality received.

    output_i = sum_j A_ij v_j and share_i^m = sum_{j in m} A_ij with A = softmax(scale q k^T + mask).

    No attention matrix is built: the fused kernel runs once per modality and the log-sum-exps of the parts give the
    shares, so the cost is about that of plain attention. Both results are differentiable once with respect to query,
    key and value; second derivatives are not offered.

    Args:
        query: (batch, head, query, width).
        key: (batch, key head, key, width). Fewer heads than the query's are shared: query head h reads key head
            h // (head / key head).
        value: (batch, key head, key, dim); dim may differ from width.
        modality: label of every key, (key,) or (batch, key), in blocks or interleaved; -1 = special (class token,
            padding), counted in no column. Labels kept on the CPU spare an accelerator the wait for them.
        num_modalities: columns of the share; default is the highest label + 1, which an accelerator must be asked for.
        mask: boolean, True = takes part, or floating, added to the scores (its type's lowest number counts as minus
            infinity). (batch, key), (batch, query, key), or anything that broadcasts to (batch, head, query, key).
            A (query, key) mask is ambiguous when both sizes are equal, so it is given as mask[None, None].
        is_causal: query i sees keys 0..i, counted from the first key also when there are more keys than queries, as
            in `F.scaled_dot_product_attention`. Applies together with the mask.
        scale: factor of the scores; default 1 / sqrt(width).
        dropout: probability with which the output forgets an attention weight. The share is of the undropped attention.

    Returns:
        Attended(output, share). A query that sees no key has output 0, share 0 and gradient 0. The columns of the
        share and the part of the special keys sum to 1 otherwise. An attention share is not proof that a modality
        was used: values may be small or cancel, so test causally before concluding.

    Raises:
        ShapeError: ranks, sizes or types that do not fit, labels out of range.

    Example:
        >>> query, key, value = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
        >>> attend(query, key, value, modality=torch.tensor([-1, 0, 1, 1])).share
        tensor([[[[0.2500, 0.5000]]]])
    """
    query, key, value = _autocast(query, key, value)
    _check_heads(query, key, value, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else _bias(mask, query, key)
    if modality is None:
        return Attended(_fused(query, key, value, bias, is_causal, scale, dropout), None)
    num_modalities = _check_modality(modality, num_modalities, query, key)
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
    """The share alone, for whoever has the output already; arguments and errors are those of ``attend``.

    Example:
        >>> query, key = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
        >>> shares(query, key, modality=torch.tensor([-1, 0, 1, 1]))
        tensor([[[[0.2500, 0.5000]]]])
    """
    _check_heads(query, key, key, 0.0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = None if mask is None else _bias(mask, query, key)
    num_modalities = _check_modality(modality, num_modalities, query, key)
    with torch.autocast(query.device.type, enabled=False):
        # Every kernel also wants values; the keys are at hand.
        found = _in_one_pass(query, key, key, modality, num_modalities, bias, is_causal, scale, 0.0)
        if found is not None:
            return found.share  # type: ignore[return-value]
        return _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale)


def _attend(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """Chooses the cheapest of three exact routes."""
    found = _in_one_pass(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)
    if found is not None:
        return found
    return _two_passes(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)


def _two_passes(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """Public functions alone: attention with one-hot values gives the shares."""
    output = _fused(query, key, value, bias, is_causal, scale, dropout)
    return Attended(output, _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale))


def _in_one_pass(
    query, key, value, modality, num_modalities, bias, is_causal, scale, dropout
) -> Attended | None:  # fmt: skip
    """Output and share together, written out where that is small, else by segments; None where neither fits."""
    rows, keys = query.shape[2], key.shape[2]
    # Plain attention with dropout has no fused kernel on a CPU either.
    drops_on_cpu = dropout > 0 and query.device.type == "cpu"
    if rows <= FEW_QUERIES or 0 in (keys, *query.shape[:2]) or drops_on_cpu:
        return _explicit(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout)
    kernel = kernel_for(query.device, query.dtype)
    if kernel is None or dropout > 0 or (bias is not None and bias.requires_grad):
        return None
    work = query.shape[1] * rows * keys * query.shape[-1]
    grain = GRAIN if query.device.type == "cpu" and query.dtype.itemsize >= 4 else 1
    groups = plan(modality, bias, is_causal=is_causal, sample_work=work, grain=grain)
    if groups is None:
        return None
    output, share, _ = SegmentedAttention.apply(
        query, key, value, bias, modality.to(query.device), groups, num_modalities, kernel, is_causal, scale
    )
    return Attended(output, share)


def _share_by_columns(query, key, modality, num_modalities, bias, is_causal, scale) -> Tensor:
    """Attention with one-hot values."""
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key, bias = query.to(exact), key.to(exact), None if bias is None else bias.to(exact)
    hot = one_hot(modality, num_modalities, query).expand(*key.shape[:3], -1)
    # Columns beyond the head's width would widen all factors, so they take another pass.
    passes = hot.split(max(query.shape[-1], 8), dim=-1)
    return torch.cat([_fused(query, key, columns, bias, is_causal, scale, 0.0) for columns in passes], dim=-1)


def _fused(query, key, value, bias, is_causal, scale, dropout) -> Float[Tensor, "batch head query dim"]:
    """`F.scaled_dot_product_attention` with shared heads, unequal widths, mask and causality, rows that see nothing."""
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
    # Backends differ in what they make of a row without keys: let it see all of them, then forget what it saw.
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(blind, 0.0), scale=scale, dropout_p=dropout
    )
    return output[..., :dim].masked_fill(blind, 0.0)


def _explicit(query, key, value, modality, num_modalities, bias, is_causal, scale, dropout) -> Attended:
    """The attention matrix written out."""
    exact = torch.promote_types(query.dtype, torch.float32)
    key_heads, heads = key.shape[1], query.shape[1]
    # Heads that share keys become rows of one head, so that keys are not copied.
    folded = query.to(exact).unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    scores = scale * folded @ key.to(exact).transpose(-1, -2)
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
    share = attention @ one_hot(modality, num_modalities, attention)
    kept = F.dropout(attention, dropout).unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    output = (kept @ value.to(exact)).view(*query.shape[:3], value.shape[-1])
    return Attended(output.to(query.dtype), share)


def _past(query: HeadTensor, key: HeadTensor) -> Bool[Tensor, "query key"]:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What the public function would do to its arguments under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) if t.dtype != torch.float64 else t for t in tensors)


def _bias(mask: Tensor, query: HeadTensor, key: HeadTensor) -> Bias:
    """Any mask as numbers to add to the scores, 4-D, with all keys written out."""
    full = (*query.shape[:3], key.shape[2])
    shaped = {2: lambda: mask[:, None, None], 3: lambda: mask[:, None], 4: lambda: mask}.get(mask.ndim, lambda: None)()
    if shaped is None or any(got not in (1, size) for got, size in zip(shaped.shape, full, strict=True)):
        batch, _, rows, keys = full
        raise ShapeError(
            "attend mask", got=f"shape {tuple(mask.shape)}",
            expected=f"(batch, key) = {(batch, keys)}, (batch, query, key) = {(batch, rows, keys)} or a shape that "
            f"broadcasts to (batch, head, query, key) = {full}",
            fix="A (query, key) mask is given as mask[None, None].",
        )  # fmt: skip
    shaped = shaped.to(query.device).expand(*shaped.shape[:3], key.shape[2])
    if shaped.dtype == torch.bool:
        return torch.zeros_like(shaped, dtype=query.dtype).masked_fill(~shaped, -math.inf)
    if not shaped.is_floating_point():
        raise ShapeError(
            "attend mask", expected="dtype torch.bool or floating", got=f"dtype {mask.dtype}",
            fix="Use mask.bool() for 0/1 masks with 1 = takes part.",
        )  # fmt: skip
    return shaped.masked_fill(shaped <= torch.finfo(shaped.dtype).min, -math.inf).to(query.dtype)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ShapeError(
                f"attend {name}", expected=f"a floating tensor of shape (batch, head, {name}, dim)",
                got=f"shape {tuple(tensor.shape)}, {tensor.dtype}",
                fix="Split heads first: x.unflatten(-1, (heads, -1)).transpose(1, 2).",
            )  # fmt: skip
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ShapeError(
                f"attend {name}", expected=f"{query.dtype} on {query.device}, as the query",
                got=f"{tensor.dtype} on {tensor.device}",
            )  # fmt: skip
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ShapeError(
            "attend key", expected=f"(batch, width) = {(query.shape[0], query.shape[3])}, as the query",
            got=f"{(key.shape[0], key.shape[3])}",
        )  # fmt: skip
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            "attend value", expected=f"(batch, key head, key) = {tuple(key.shape[:3])}, as the key",
            got=f"{tuple(value.shape[:3])}",
        )  # fmt: skip
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ShapeError(
            "attend key", expected=f"a number of heads that divides the query's, heads = {query.shape[1]}",
            got=f"{key.shape[1]} heads",
        )  # fmt: skip
    if not 0.0 <= dropout < 1.0:
        raise ShapeError("attend dropout", expected="a probability in [0, 1)", got=str(dropout))


def _check_modality(modality: Tensor, num_modalities: int | None, query: Tensor, key: Tensor) -> int:
    """The number of modalities, after a look at the labels where looking is free."""
    batch, keys = query.shape[0], key.shape[2]
    if not isinstance(modality, Tensor):
        raise ShapeError(
            "attend modality", expected="a tensor of integer labels", got=type(modality).__name__,
            fix="Use torch.tensor([0, 0, 1, ...]), one label for every key.",
        )  # fmt: skip
    if modality.is_floating_point() or modality.dtype == torch.bool or modality.is_complex():
        raise ShapeError("attend modality", expected="integer labels", got=f"dtype {modality.dtype}")
    if tuple(modality.shape) not in ((keys,), (batch, keys)):
        raise ShapeError(
            "attend modality", expected=f"shape (key,) = {(keys,)} or (batch, key) = {(batch, keys)}",
            got=f"shape {tuple(modality.shape)}", fix="Give one label for every key, special tokens included.",
        )  # fmt: skip
    if num_modalities is None:
        num_modalities = int(modality.max()) + 1 if modality.numel() else 0
    if modality.device.type == "cpu" and modality.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in modality.aminmax())
        if low < -1 or high >= num_modalities:
            raise ShapeError(
                "attend modality", expected=f"labels from -1 to num_modalities - 1 = {num_modalities - 1}",
                got=f"labels from {low} to {high}", fix="Special tokens and padding have label -1.",
            )  # fmt: skip
    return num_modalities
