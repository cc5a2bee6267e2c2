"""Modular attention (MODA): attention to keys of the same and of other modalities, and merging of both parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from .attention_arguments import apply_autocast_dtype, check_heads, check_modality, mask_to_bias, without_hidden
from .pseudo_attention import PseudoAttention, pseudo_logits
from .sdpa_kernels import HeadTensor
from .self_cross_parts import Part, Sides, own_and_cross

Merge = Literal["mass", "gate", "sum", "concat"]


class ModularAttentionResult(NamedTuple):
    """Result of `modular_attention`.

    Attributes:
        output: (batch, head, query, dim); twice as wide, [own; cross], with ``merge="concat"``.
        own: attention to the keys of the query's modality, (output, lse), including pseudo-attention.
        cross: attention to all other keys.
    """

    output: Float[Tensor, "batch head query dim"]
    own: Part
    cross: Part


def modular_attention(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch key_head key width"],
    value: Float[Tensor, "batch key_head key dim"],
    *,
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"],
    query_modality: Int[Tensor, " query"] | Int[Tensor, "batch query"] | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    offset: int = 0,
    merge: Merge = "mass",
    gate: Float[Tensor, "#batch #head #query"] | None = None,
    pseudo: PseudoAttention | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> ModularAttentionResult:
    """Computes attention to keys of the same and of other modalities separately and merges both::

        O_self  = softmax over the keys j with S_ij,  S_ij = [modality(i) = modality(j) >= 0]
        O_cross = softmax over all others
        "mass":   O = l O_self + (1 - l) O_cross,  l = Z_self / (Z_self + Z_cross)       Z = sum_j exp(s_ij)
        "gate":   the same with l = sigmoid(gate)
        "sum":    O = O_self + O_cross
        "concat": O = [O_self; O_cross]

    "mass" without pseudo-attention is ordinary attention. Pseudo-attention corresponds to an additional key in each
    part with value 0 and logit b (see ``PseudoAttention``): the output is multiplied by Z / (Z + exp(b)), and exp(b) is
    added to Z, without appending a key. The fused kernel runs twice for the queries of each modality, once per part; no
    attention matrix is materialized.

    Args:
        query: (batch, head, query, width).
        key: (batch, key head, key, width); fewer heads than in the query are shared (grouped-query attention).
        value: (batch, key head, key, dim).
        modality: label of every key, (key,) or (batch, key); -1 = special, a key of the cross part for every query.
        query_modality: label of every query; by default queries and keys are the same tokens. The self part of special
            queries (-1) is empty.
        mask: as in ``attend``.
        is_causal: query i attends to keys 0..offset + i. Applies together with the mask.
        offset: position of the first query among the keys; keys - queries with a key-value cache.
        merge: ``"mass"``, ``"gate"``, ``"sum"`` or ``"concat"``.
        gate: for "gate", logits of l that broadcast to (batch, head, query); shape (head, 1) for one per head.
        pseudo: options of pseudo-attention; None disables it.
        scale: factor of the scores; default 1 / sqrt(width).
        dropout: dropout probability of the attention weights of each part.

    Returns:
        ModularAttentionResult(output, own, cross), differentiable once. A query without visible keys in one part uses
        only the other part; output and gradient are 0 if both are empty.

    Raises:
        ShapeError: ranks, sizes or types are incompatible.
        ConfigError: merge is unknown; the gate is missing, or given for a merge without gate.

    Reference: MODA (ICML 2025), equations 7 and 8; pseudo-attention after StableMask (ICML 2024).
    Differs from the released code in: the release has no modular mask. The paper does not specify how the parts are
    merged.

    Example:
        >>> x, value = torch.zeros(1, 1, 3, 2), torch.tensor([[[[0.0], [3.0], [6.0]]]])
        >>> modular_attention(x, x, value, modality=torch.tensor([0, 0, 1]), merge="sum").output.flatten()
        tensor([7.5000, 7.5000, 7.5000])
    """
    with _errors_as_modular_attention():
        query, key, value = apply_autocast_dtype(query, key, value)
        check_heads(query, key, value, dropout)
        check_modality(modality, None, query, key)
        bias = None if mask is None else mask_to_bias(mask, query, key)
    sides = _sides(modality, query_modality, bias, is_causal, offset, query, key)
    key, value = without_hidden(query, key, value, bias, is_causal, offset)
    _check_merge(merge, gate, query)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        own, cross = own_and_cross(query, key, value, sides, factor, dropout)
        blind = own.lse == -torch.inf, cross.lse == -torch.inf
        if pseudo is not None:
            logits = pseudo_logits(pseudo, sides, query, key)
            own, cross = (with_pseudo(part, b) for part, b in zip((own, cross), logits, strict=True))
        return ModularAttentionResult(merge_attention_parts(own, cross, merge, gate, blind), own, cross)


def with_pseudo(part: Part, logit: Float[Tensor, "#batch #head query"]) -> Part:
    """Adds a key with value 0 and the given logit to a part."""
    lse = _finite(part.lse)
    fraction = (lse - logit).sigmoid()[..., None].to(part.output.dtype)
    return Part(part.output * fraction, torch.logaddexp(lse, logit.to(lse.dtype)))


def merge_attention_parts(
    own: Part, cross: Part, merge: Merge, gate: Tensor | None, blind: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch head query dim"]:
    """Merges the two parts; ``blind`` marks queries without visible keys in (own, cross)."""
    if merge == "sum":
        return own.output + cross.output
    if merge == "concat":
        return torch.cat([own.output, cross.output], dim=-1)
    if merge == "mass":
        weight = (_finite(own.lse) - _finite(cross.lse)).sigmoid()
    else:
        weight = gate.to(own.lse.dtype).sigmoid().expand(own.lse.shape)  # type: ignore[union-attr]
        weight = weight.masked_fill(blind[0], 0.0).masked_fill(blind[1], 1.0)
    return torch.lerp(cross.output, own.output, weight[..., None].to(own.output.dtype))


def _finite(lse: Tensor) -> Tensor:
    """Clamps minus infinity to the lowest finite number, with gradient 0, since -inf - (-inf) is NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def _sides(modality, query_modality, bias, is_causal, offset, query, key) -> Sides:
    rows, keys = query.shape[2], key.shape[2]
    same = query_modality is None
    if same and rows != keys:
        raise ShapeError(
            "modular_attention query_modality", expected=f"labels of the queries: {rows} queries and {keys} keys",
            got="None", fix="With a cache, give the labels of the new tokens, and offset = keys - queries.",
        )  # fmt: skip
    queries = modality if query_modality is None else query_modality
    if tuple(queries.shape) not in ((rows,), (query.shape[0], rows)) or queries.is_floating_point():
        raise ShapeError(
            "modular_attention query_modality", got=f"shape {tuple(queries.shape)}, {queries.dtype}",
            expected=f"integer labels of shape (query,) = {(rows,)} or (batch, query) = {(query.shape[0], rows)}",
        )  # fmt: skip
    if offset < 0:
        raise ShapeError("modular_attention offset", expected="offset >= 0", got=f"{offset}")
    valid = None
    if bias is not None:
        valid = (bias != -torch.inf).any(dim=(1, 2)).expand(query.shape[0], keys)
    return Sides(modality, queries, same, valid, bias, is_causal, offset)


def _check_merge(merge: str, gate: Tensor | None, query: HeadTensor) -> None:
    if merge not in get_args(Merge):
        raise unknown_name("modular_attention", "merge", str(merge), get_args(Merge))
    if (gate is not None) != (merge == "gate"):
        raise ConfigError(
            "modular_attention", expected="a gate with merge='gate' and none otherwise",
            got=f"gate = {'None' if gate is None else 'a tensor'} with merge = '{merge}'",
            fix="Zeros of shape (head, 1) weight both parts equally.",
        )  # fmt: skip
    if gate is not None:
        full, shape = tuple(query.shape[:3]), tuple(gate.shape)
        if len(shape) > 3 or any(n not in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False)):
            raise ShapeError(
                "modular_attention gate", expected=f"a shape that broadcasts to (batch, head, query) = {full}",
                got=f"shape {shape}",
            )  # fmt: skip


@contextmanager
def _errors_as_modular_attention() -> Iterator[None]:
    """Replaces ``attend`` by ``modular_attention`` in errors of the shared checks."""
    try:
        yield
    except ShapeError as error:
        who = error.who.replace("attend", "modular_attention", 1)
        raise ShapeError(who, expected=error.expected, got=error.got, fix=error.fix) from None
