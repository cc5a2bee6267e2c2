"""QUAG: averages attention inside quadrants of (modality of the query, modality of the key)."""

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
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import SPECIAL
from .model_inputs import labels_of

Pair = tuple[int, int]
"""Labels of query and key; query label -1 stands for class and other special tokens."""

ClsRows = Literal["keys", "skip", "all"]
CLS_ROWS = ("keys", "skip", "all")

BY_READER = ("unimodal", "crossmodal")
"""Operators that depend on the modality of the query."""

CHUNK = 256
"""Number of queries whose masks are materialized at once."""


def operators(names: Sequence[str], *, cls_rows: ClsRows = "keys") -> dict[str, tuple[Pair, ...]]:
    """Returns the QUAG operators for some modalities: name -> averaged quadrants.

    ``"unimodal"``: queries and keys of the same modality. ``"crossmodal"``: of different modalities. ``"avg-<name>"``:
    all queries and the keys of that modality. ``"all"``: every quadrant.

    Args:
        names: of the modalities.
        cls_rows: treatment of queries that are special tokens, such as a class token: ``"keys"`` averages them for
            operators that do not depend on the query ("avg-..." and "all"), ``"skip"`` never, ``"all"`` for every
            operator.

    Raises:
        ConfigError: an unknown cls_rows.

    Reference: RollingQ (ICML 2025), Table 9.

    Example:
        >>> operators(("audio", "image"))["avg-image"]
        ((0, 1), (1, 1), (-1, 1))
    """
    if cls_rows not in CLS_ROWS:
        raise unknown_name("quag", "cls_rows", str(cls_rows), CLS_ROWS)
    indices = range(len(names))
    quadrants = {
        "unimodal": [(m, m) for m in indices],
        "crossmodal": [(m, n) for m in indices for n in indices if m != n],
        **{f"avg-{name}": [(m, n) for m in indices] for n, name in enumerate(names)},
        "all": [(m, n) for m in indices for n in indices],
    }
    for name, pairs in quadrants.items():
        if cls_rows == "all" or (cls_rows == "keys" and name not in BY_READER):
            pairs += [(SPECIAL, n) for n in sorted({n for _, n in pairs})]
    return {name: tuple(pairs) for name, pairs in quadrants.items()}


def chosen_operators(names: Sequence[str], requested: Sequence[str] | None, cls_rows: ClsRows) -> tuple[str, ...]:
    """The requested operators; by default all with at least one quadrant."""
    if requested is not None:
        return tuple(requested)
    return tuple(name for name, pairs in operators(names, cls_rows=cls_rows).items() if pairs)


def quag_attention(
    attention: Float[Tensor, "batch head query key"],
    rows: Int[Tensor, "... query"],
    columns: Int[Tensor, "... key"],
    pairs: Collection[Pair],
    visible: Bool[Tensor, "#batch #head #query #key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Computes A'_ij = mean of A_ij' over the visible keys j' of the modality of j, for all (i, j) in the quadrants.

    Args:
        attention: (batch, head, query, key), after softmax.
        rows: (query,) or (batch, query) labels of the queries, -1 = special.
        columns: (key,) or (batch, key) labels of the keys; keys with -1 are not changed.
        pairs: quadrants (label of the row, label of the column); see ``operators``.
        visible: True = the query sees the key; other entries are not changed. None: all.

    Returns:
        Attention with unchanged sums over the keys of each modality, and therefore over each row.

    Raises:
        ShapeError: labels do not fit. ConfigError: a quadrant without a column.

    Example:
        >>> attention = torch.tensor([[[[0.5, 0.25, 0.25]]]])
        >>> quag_attention(attention, torch.tensor([1]), torch.tensor([0, 0, 1]), [(1, 0)])
        tensor([[[[0.3750, 0.3750, 0.2500]]]])
    """
    batch, _, queries, keys = attention.shape
    columns, count = labels_of(columns, None, batch, keys, "quag_attention columns")
    rows, readers = labels_of(rows, None, batch, queries, "quag_attention rows")
    # A modality may have no token.
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
    """Computes the attention output under QUAG without materializing the attention matrix.

    out_i = sum over averaged modalities c of share_ic mean_ic + sum over all other keys j of A_ij v_j

    mean_ic is the mean of v_j over the visible keys j of c. Shares and the second sum are computed with fused kernels;
    the means are prefix means for causal attention, and products of mask and values in chunks for other masks.

    Args:
        call: the attention call; dropout is not applied.
        labels: (key,) or (batch, key), -1 = special or padding.
        query_labels: (query,) or (batch, query).
        num_modalities: number of modalities.
        pairs: quadrants (label of the row, label of the column).

    Raises:
        ConfigError: a quadrant without a column.

    Reference: RollingQ (ICML 2025), Table 9.
    Differs from the released code in: no matrix; the efficient variant of that code, a mean token with log n added to
    its logit, is not equivalent.
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
    """Mask of the modalities that are averaged for each query.

    Raises:
        ConfigError: the column of a quadrant is not a modality, or its row is neither a modality nor -1.
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
    """Output of the keys outside the averaged quadrants, computed for groups of queries with the same quadrants."""
    exact = torch.promote_types(call.value.dtype, torch.float32)
    total = call.value.new_zeros(*call.sizes[:3], call.value.shape[-1], dtype=exact)
    for chosen in taken.flatten(0, 1).unique(dim=0):
        gone = chosen[labels.clamp(min=0).long()] & (labels >= 0)
        if bool(gone.all()):
            continue
        part = replace(call, value=call.value.masked_fill(gone[:, None, :, None], 0.0))
        rows = (taken == chosen).all(dim=-1)
        # Selected queries would need an explicit causal mask, which is large.
        if call.is_causal or bool(rows.all()):
            total = torch.where(rows[:, None, :, None], attention_output(part).to(exact), total)
            continue
        index = torch.argsort(~rows, dim=1, stable=True)[:, : int(rows.sum(dim=1).max())]
        output = attention_output(select_queries(part, index)).to(exact)
        output = output.masked_fill(~rows.gather(1, index)[:, None, :, None], 0.0)
        total = total.scatter_add(2, index[:, None, :, None].expand_as(output), output)
    return total


def _visible_mean(call: AttentionCall, member: Bool[Tensor, "batch key"]) -> Float[Tensor, "batch somehead #query dim"]:
    """Mean of the values of the visible member keys of each query; 0 without any."""
    value = at_least_float32(call.value)
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
    """The mask in chunks of queries, combined with the causal mask."""
    for start in range(0, mask.shape[2], CHUNK):
        part = mask[:, :, start : start + CHUNK]
        if is_causal:
            positions = torch.arange(start, start + part.shape[2], device=mask.device)[:, None]
            part = part & (torch.arange(keys, device=mask.device) <= positions)
        yield part


def _mean(members: Bool[Tensor, "#batch #head some key"], value: Float[Tensor, "batch somehead key dim"]) -> Tensor:
    weight = members.to(value.dtype)
    counts = weight.sum(dim=-1, keepdim=True).clamp(min=1)
    if weight.shape[1] > 1:
        return weight @ value / counts
    # One product for all heads avoids copying the weights.
    sums = weight[:, 0] @ value.transpose(1, 2).flatten(2)
    return sums.unflatten(-1, (value.shape[1], -1)).transpose(1, 2) / counts
