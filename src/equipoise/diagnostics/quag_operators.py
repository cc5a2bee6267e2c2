"""QUAG: attention averaged inside quadrants of who reads and who is read, as a matrix or without one (spec 8.6)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..recording import AttentionCall
from ..recording.attention_call import select_queries
from ..recording.share_measurement import attention_output, measure_share
from ..tokens.token_batch import SPECIAL
from .model_inputs import labels_of

Pair = tuple[int, int]
"""Labels of who reads and who is read; -1 reads for class and other special tokens."""

ClsRows = Literal["keys", "skip", "all"]
CLS_ROWS = ("keys", "skip", "all")

BY_READER = ("unimodal", "crossmodal")
"""Operators that ask of what modality the reader is."""

CHUNK = 256
"""Queries whose masks are written out as numbers at once."""


def operators(names: Sequence[str], *, cls_rows: ClsRows = "keys") -> dict[str, tuple[Pair, ...]]:
    """The operators of QUAG for some modalities: name -> quadrants that are averaged.

    ``"unimodal"``: who reads its own modality. ``"crossmodal"``: who reads another one. ``"avg-<name>"``: that modality
    as it is read by all. ``"all"``: every quadrant.

    Args:
        names: of the modalities.
        cls_rows: what special tokens do that read, such as a class token: ``"keys"`` take part where everybody does
            ("avg-..." and "all"), ``"skip"`` nowhere, ``"all"`` in every modality that an operator averages.

    Raises:
        ConfigError: an unknown cls_rows.

    Reference: RollingQ (ICML 2025), Table 9; spec 8.6.

    Example:
        >>> operators(("audio", "image"))["avg-image"]
        ((0, 1), (1, 1), (-1, 1))
    """
    if cls_rows not in CLS_ROWS:
        raise unknown_name("quag", "cls_rows", str(cls_rows), CLS_ROWS)
    every = range(len(names))
    found = {
        "unimodal": [(m, m) for m in every],
        "crossmodal": [(m, n) for m in every for n in every if m != n],
        **{f"avg-{name}": [(m, n) for m in every] for n, name in enumerate(names)},
        "all": [(m, n) for m in every for n in every],
    }
    for name, pairs in found.items():
        if cls_rows == "all" or (cls_rows == "keys" and name not in BY_READER):
            pairs += [(SPECIAL, n) for n in sorted({n for _, n in pairs})]
    return {name: tuple(pairs) for name, pairs in found.items()}


def chosen_operators(names: Sequence[str], wanted: Sequence[str] | None, cls_rows: ClsRows) -> tuple[str, ...]:
    """The operators that are wanted; by default all that have a quadrant."""
    found = operators(names, cls_rows=cls_rows)
    return tuple(name for name, pairs in found.items() if pairs) if wanted is None else tuple(wanted)


def quag_attention(
    attention: Float[Tensor, "batch head query key"],
    rows: Int[Tensor, "... query"],
    columns: Int[Tensor, "... key"],
    pairs: Collection[Pair],
    visible: Bool[Tensor, "#batch #head #query #key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """A'_ij = mean of A_ij' over the visible keys j' of j's modality, where i reads it in one of the quadrants.

    Args:
        attention: (batch, head, query, key), after softmax.
        rows: (query,) or (batch, query) label of who reads, -1 = special.
        columns: (key,) or (batch, key) label of who is read; keys of -1 stay as they are.
        pairs: quadrants (label of the row, label of the column); ``operators`` makes them.
        visible: True = the query may see the key; others stay as they are. None: all.

    Returns:
        Attention with the same sums over each modality's keys, and so over each row.

    Raises:
        ShapeError: labels that do not fit. ConfigError: a quadrant without a column.

    Reference: spec 8.6.

    Example:
        >>> attention = torch.tensor([[[[0.5, 0.25, 0.25]]]])
        >>> quag_attention(attention, torch.tensor([1]), torch.tensor([0, 0, 1]), [(1, 0)])
        tensor([[[[0.3750, 0.3750, 0.2500]]]])
    """
    batch, _, queries, keys = attention.shape
    columns, count = labels_of(columns, None, batch, keys, "quag_attention columns")
    rows, readers = labels_of(rows, None, batch, queries, "quag_attention rows")
    # A modality may be absent.
    count = max(count, readers, *(1 + label for pair in pairs for label in pair))
    taken = averaged_attention(pairs, count, rows)
    columns = columns.to(attention.device)
    for column in range(count):
        block = taken[:, None, :, column, None] & (columns == column)[:, None, None]
        if visible is not None:
            block = block & visible.to(block.device)
        size = block.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = attention.masked_fill(~block, 0.0).sum(dim=-1, keepdim=True) / size
        attention = torch.where(block, mean, attention)
    return attention


def quag_output(
    call: AttentionCall,
    labels: Int[Tensor, "... key"],
    query_labels: Int[Tensor, "... query"],
    num_modalities: int,
    pairs: Collection[Pair],
) -> Float[Tensor, "batch head query dim"]:
    """The output of an attention under QUAG, without its matrix.

    out_i = sum over modalities c that i reads averaged of share_ic mean_ic + sum over all other keys j of A_ij v_j

    mean_ic is the mean of v_j over the keys j of c that i sees. Shares and the rest come from fused kernels; causality
    alone makes prefix means of the values, other masks means by a product of mask and values, some queries at a time.

    Args:
        call: the attention; dropout has no part in it.
        labels: (key,) or (batch, key), -1 = special or padding.
        query_labels: (query,) or (batch, query).
        num_modalities: of the labels.
        pairs: quadrants (label of the row, label of the column).

    Raises:
        ConfigError: a quadrant without a column.

    Reference: spec 8.6.
    Differs from the released code in: no matrix; their efficient variant, a mean token with log n times its logit, is
    another thing.
    """
    batch, heads, queries, keys = call.sizes
    taken = averaged_attention(pairs, num_modalities, query_labels.to(call.value.device).expand(batch, queries))
    share = measure_share(call, labels, num_modalities).share
    labels = labels.to(call.value.device).expand(batch, keys)
    output = _rest(call, labels, taken)
    with torch.autocast(output.device.type, enabled=False):
        for column in sorted({column for _, column in pairs}):
            mean = _visible_mean(call, labels == column)
            part = share[..., column].masked_fill(~taken[:, None, :, column], 0.0).to(mean.dtype)
            output += part[..., None] * mean.repeat_interleave(heads // mean.shape[1], dim=1)
    return output.to(call.query.dtype)


def averaged_attention(
    pairs: Collection[Pair], num_modalities: int, rows: Int[Tensor, "batch query"]
) -> Bool[Tensor, "batch query modality"]:
    """Which modalities every query reads averaged.

    Raises:
        ConfigError: a quadrant whose column is no modality, or whose row is neither that nor -1.
    """
    table = torch.zeros(num_modalities + 1, num_modalities, dtype=torch.bool)
    for row, column in pairs:
        if not (SPECIAL <= row < num_modalities and 0 <= column < num_modalities):
            raise ConfigError(
                "quag",
                expected=f"quadrants (row, column) with columns from 0 to {num_modalities - 1}, rows also -1",
                got=str((row, column)),
                fix="Columns of special tokens are never averaged.",
            )
        table[row + 1, column] = True
    return table.to(rows.device)[rows.long() + 1]


def _rest(call: AttentionCall, labels: Tensor, taken: Tensor) -> Float[Tensor, "batch head query dim"]:
    """What the keys outside the averaged quadrants give: queries that read the same ones averaged at a time."""
    exact = torch.promote_types(call.value.dtype, torch.float32)
    total = call.value.new_zeros(*call.sizes[:3], call.value.shape[-1], dtype=exact)
    for chosen in taken.flatten(0, 1).unique(dim=0):
        gone = chosen[labels.clamp(min=0).long()] & (labels >= 0)
        if bool(gone.all()):
            continue
        part = replace(call, value=call.value.masked_fill(gone[:, None, :, None], 0.0))
        rows = (taken == chosen).all(dim=-1)
        # Queries that are picked out need a mask for their causality, which would be large.
        if call.is_causal or bool(rows.all()):
            total = torch.where(rows[:, None, :, None], attention_output(part).to(exact), total)
            continue
        index = torch.argsort(~rows, dim=1, stable=True)[:, : int(rows.sum(dim=1).max())]
        found = attention_output(select_queries(part, index)).to(exact)
        found = found.masked_fill(~rows.gather(1, index)[:, None, :, None], 0.0)
        total = total.scatter_add(2, index[:, None, :, None].expand_as(found), found)
    return total


def _visible_mean(call: AttentionCall, member: Bool[Tensor, "batch key"]) -> Float[Tensor, "batch somehead #query dim"]:
    """Mean of the values of the member keys that each query sees; 0 where it sees none."""
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    mask, members = replace(call, is_causal=False).visible(), member[:, None, None]
    if mask is not None and mask.shape[1] > 1:
        value = value.repeat_interleave(mask.shape[1] // value.shape[1], dim=1)
    if mask is not None and mask.shape[2] > 1:
        return torch.cat(
            [_mean(part & members, value) for part in _pieces(mask, call.is_causal, member.shape[1])], dim=2
        )
    if mask is not None:
        members = members & mask
    if not call.is_causal:
        return _mean(members, value)
    weight = members.to(value.dtype).transpose(-1, -2)
    last = torch.arange(call.sizes[2], device=value.device).clamp(max=member.shape[1] - 1)
    sums, counts = ((weight * part).cumsum(dim=2)[:, :, last] for part in (value, torch.ones_like(weight)))
    return sums / counts.clamp(min=1)


def _pieces(mask: Tensor, is_causal: bool, keys: int) -> Iterator[Bool[Tensor, "#batch #head some #key"]]:
    """The mask of some queries after the other, causality in it."""
    for start in range(0, mask.shape[2], CHUNK):
        part = mask[:, :, start : start + CHUNK]
        if is_causal:
            places = torch.arange(start, start + part.shape[2], device=mask.device)[:, None]
            part = part & (torch.arange(keys, device=mask.device) <= places)
        yield part


def _mean(members: Bool[Tensor, "#batch #head some key"], value: Float[Tensor, "batch somehead key dim"]) -> Tensor:
    weight = members.to(value.dtype)
    counts = weight.sum(dim=-1, keepdim=True).clamp(min=1)
    if weight.shape[1] > 1:
        return weight @ value / counts
    # One product for all heads, so that the weights are not copied for each.
    sums = weight[:, 0] @ value.transpose(1, 2).flatten(2)
    return sums.unflatten(-1, (value.shape[1], -1)).transpose(1, 2) / counts
