"""``AttentionCall``: the inputs of one attention, independent of the code that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MASKED = -5e3
"""A score as low as this comes from a mask: its weight is 0 in every type."""


class KeyOffsets(NamedTuple):
    """Numbers added to the scores of groups of keys.

    Attributes:
        members: (batch, group, key) True for the keys of each group; a key belongs to at most one group.
        values: the number for each group, the same for all samples, heads or queries where the size is 1.
    """

    members: Bool[Tensor, "batch group key"]
    values: Float[Tensor, "#batch #head #query group"]

    def by_key(self, rows: slice = slice(None)) -> Float[Tensor, "#batch #head #query key"]:
        """Returns the value of each key, for the selected queries."""
        values = self.values[:, :, rows] if self.values.shape[2] > 1 else self.values
        # A product of matrices would be rounded to a lower precision on some devices.
        total = values.new_zeros(1, 1, 1, 1)
        for group in range(values.shape[-1]):
            total = torch.where(self.members[:, group, None, None], values[..., group, None], total)
        return total


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The inputs of one attention, in the same form for every interceptor.

    Attributes:
        query: (batch, head, query, width) as the scores see it, after positions and rotations.
        key: (batch, key head, key, width), those of a cache included; query head h reads h // (head / key head).
        value: (batch, key head, key, dim).
        mask: boolean, True = takes part, or floating, added to the scores; broadcasts to (batch, head, query, key).
        is_causal: query i sees keys 0..i, counted from the first key, together with the mask.
        scale: factor of the scores; None is 1 / sqrt(width).
        sinks: (head,) logits of a virtual key that takes attention and gives nothing.
        softcap: scores s become softcap tanh(s / softcap).
        offsets: added to the scores after the softcap; only together with one.
        attention: (batch, head, query, key), where the model itself has written it out.
        modality, names: labels of the keys, where the layer itself provides them.
        added: keys at the end that the layer adds by itself, and that belong to no modality.
        reads_itself: the queries are the first of the tokens that are read, so what masks keys masks them too.
        sources: what queries and keys are projected from, where the projection itself is not followed.
        batch_dim: the batch dimension of ``sources``; None for a single sample without one.
    """

    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch keyhead key width"]
    value: Float[Tensor, "batch keyhead key dim"]
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    softcap: float | None = None
    offsets: KeyOffsets | None = None
    attention: Float[Tensor, "batch head query key"] | None = None
    modality: Int[Tensor, "... key"] | None = None
    names: tuple[str, ...] = ()
    added: int = 0
    reads_itself: bool = True
    sources: tuple[Tensor, Tensor] | None = None
    batch_dim: int | None = 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        if self.attention is not None:
            return tuple(self.attention.shape)  # type: ignore[return-value]
        batch, heads, rows, _ = self.query.shape
        return batch, heads, rows, self.key.shape[2]

    def visible(self) -> Bool[Tensor, "#batch #head #query key"] | None:
        """Returns True where a query may attend to a key, by mask and causality; None if nothing is masked."""
        visible = self.mask
        if visible is not None and visible.dtype != torch.bool:
            visible = visible > MASKED
        if self.is_causal:
            _, _, rows, keys = self.sizes
            past = torch.ones(rows, keys, dtype=torch.bool, device=self.query.device).tril()[None, None]
            visible = past if visible is None else visible & past
        return visible

    def queries_with_keys(self) -> Bool[Tensor, "#batch query"] | None:
        """Returns the queries with at least one visible key; None if all have one."""
        if self.mask is None:
            return None
        visible = self.visible()
        return None if visible is None else visible.any(dim=-1).any(dim=1)

    def visible_keys(self) -> Bool[Tensor, "batch key"] | None:
        """Returns the keys visible to at least one query; None where no mask is known.

        If the attention matrix is known and its mask is not, a key with weight 0 for all heads and queries is masked.
        """
        if self.mask is None:
            return None if self.attention is None else (self.attention != 0).any(dim=2).any(dim=1)
        batch, _, _, keys = self.sizes
        visible = self.visible()
        return None if visible is None else visible.any(dim=2).any(dim=1).expand(batch, keys)

    def with_mask(self, keep: Bool[Tensor, "#batch #head #query key"]) -> AttentionCall:
        """Returns the same attention with all keys masked where ``keep`` is False."""
        if self.mask is None:
            mask = keep
        elif self.mask.dtype == torch.bool:
            mask = self.mask & keep
        else:
            mask = self.mask.masked_fill(~keep, -math.inf)
        return replace(self, mask=mask)


class QueryRows(NamedTuple):
    """The queries to record.

    Attributes:
        weight: (batch, query), or (batch, n) along ``index``: 1 for a query that counts, else 0.
        index: (batch, n) indices of the queries; None if all queries are recorded.
    """

    weight: Float[Tensor, "batch n"]
    index: Int[Tensor, "batch n"] | None = None

    def by_query(self, rows: int) -> Float[Tensor, "batch query"]:
        """Returns the weight of each of all ``rows`` queries: 0 for those that are not recorded."""
        if self.index is None:
            return self.weight
        return self.weight.new_zeros(len(self.index), rows).scatter(1, self.index, self.weight)


GATHER_THRESHOLD = 4
"""Gather the selected queries if fewer than one in this many is selected."""


def query_rows(chosen: Bool[Tensor, "batch query"]) -> QueryRows:
    """Returns the queries selected by a boolean mask, gathered if they are few."""
    most = int(chosen.sum(dim=1).max()) if chosen.numel() else 0
    if most * GATHER_THRESHOLD > chosen.shape[1]:
        return QueryRows(chosen.float())
    # A stable sort moves the selected queries to the front in their order.
    index = torch.argsort(~chosen, dim=1, stable=True)[:, : max(most, 1)]
    return QueryRows(chosen.gather(1, index).float(), index)


def select_queries(call: AttentionCall, index: Int[Tensor, "batch n"] | None) -> AttentionCall:
    """Returns the attention of the queries at ``index`` only."""
    if index is None:
        return call
    batch, heads, _, keys = call.sizes
    at = index[:, None, :, None]
    attention = call.attention
    if attention is not None:
        attention = attention.gather(2, at.expand(-1, heads, -1, keys))
    query = call.query.gather(2, at.expand(-1, heads, -1, call.query.shape[-1]))
    mask = call.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask.expand(batch, -1, -1, -1).gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
    offsets = call.offsets
    if offsets is not None and offsets.values.shape[2] > 1:
        values = offsets.values.expand(batch, -1, -1, -1)
        values = values.gather(2, at.expand(-1, values.shape[1], -1, values.shape[3]))
        offsets = offsets._replace(values=values)
    selected = replace(call, query=query, mask=mask, attention=attention, is_causal=False, offsets=offsets)
    if call.is_causal:
        selected = selected.with_mask(torch.arange(keys, device=index.device) <= at)
    return selected
