"""Attention of the samples that passed through a layer in one batch, summed over the recorded queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall, QueryRows, select_queries
from .share_measurement import MeasuredShare, key_mass, measure_share
from .token_labels import LabeledKeys


@dataclass(eq=False)
class BatchRecord:
    """Sums over the watched queries; ``keys`` counts what they read, and ``start`` is the place of the first key."""

    share: Float[Tensor, "batch head modality"]
    sink: Float[Tensor, "batch head"]
    count: Float[Tensor, " batch"]
    keys: Float[Tensor, "batch modality"]
    by_query: Float[Tensor, "batch head query_modality modality"] | None = None
    query_count: Float[Tensor, "batch query_modality"] | None = None
    tokens: Float[Tensor, "batch head key"] | None = None
    labels: Int[Tensor, "batch key"] | None = None
    start: int = 0

    def add(self, other: BatchRecord, alive: Bool[Tensor, " batch"] | None = None) -> None:
        """The same samples, further on; those that are not alive have got no keys any more."""
        self.share = self.share + other.share
        self.sink = self.sink + other.sink
        self.count = self.count + other.count
        self.keys = other.keys if alive is None else torch.where(alive[:, None], other.keys, self.keys)
        if self.by_query is not None and other.by_query is not None:
            self.by_query = self.by_query + other.by_query
            self.query_count = self.query_count + other.query_count  # type: ignore[operator]
        else:
            self.by_query = self.query_count = None
        if self.tokens is not None and other.tokens is not None:
            labels: Tensor = other.labels  # type: ignore[assignment]
            if alive is not None:
                labels = labels.masked_fill(~alive[:, None], SPECIAL)
            self._add_tokens(other.tokens, labels, other.start - self.start)

    def folded(self, samples: int) -> BatchRecord:
        """Windows or images of a sample, which follow one another in the batch, as queries of that sample."""
        if not samples or len(self.share) == samples or len(self.share) % samples:
            return self

        def total(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.unflatten(0, (samples, -1)).sum(dim=1)

        def joined(part: Tensor | None) -> Tensor | None:
            # Keys of one window behind those of another.
            return None if part is None else part.unflatten(0, (samples, -1)).movedim(1, -2).flatten(-2)

        return replace(
            self, share=total(self.share), sink=total(self.sink), count=total(self.count), keys=total(self.keys),
            by_query=total(self.by_query), query_count=total(self.query_count), tokens=joined(self.tokens),
            labels=joined(self.labels),
        )  # fmt: skip

    def _add_tokens(self, tokens: Tensor, labels: Tensor, start: int) -> None:
        """Keys that follow; where there is a window, they begin later."""
        end = max(self.tokens.shape[-1], start + tokens.shape[-1])  # type: ignore[union-attr]
        longer = F.pad(self.tokens, (0, end - self.tokens.shape[-1]))  # type: ignore[union-attr, arg-type]
        known = F.pad(self.labels, (0, end - self.labels.shape[-1]), value=SPECIAL)  # type: ignore[union-attr, arg-type]
        span = slice(start, start + tokens.shape[-1])
        longer[..., span] += tokens
        known[..., span] = torch.where(labels == SPECIAL, known[..., span], labels)
        self.tokens, self.labels = longer, known

    def take(self, index: Int[Tensor, " row"], keep: Bool[Tensor, " row"] | None = None) -> BatchRecord:
        """Samples in another order or several times; where ``keep`` is False, without what they add to sums."""
        records = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value[index]
                if keep is not None and name not in ("keys", "labels"):
                    value = value.masked_fill(~keep.view(-1, *(1,) * (value.ndim - 1)), 0.0)
            records[name] = value
        return BatchRecord(**records)


def sum_shares(call: AttentionCall, known: LabeledKeys, rows: QueryRows, *, with_tokens: bool) -> BatchRecord:
    """Sums over the watched queries of one call, on its device."""
    batch, heads, _, keys = call.sizes
    count = len(known.names)
    few = select_queries(call, rows.index)
    weight = rows.weight.to(few.query.device)
    # A query that sees nothing has no attention to divide.
    if (has_keys := few.queries_with_keys()) is not None:
        weight = weight * has_keys
    if known.constant is not None and few.sinks is None and few.attention is None:
        # Of one modality alone: it gets all.
        share = few.query.new_zeros(batch, heads, weight.shape[1], count, dtype=torch.float32)
        share[..., known.constant] = 1.0
        measured = MeasuredShare(share)
    else:
        measured = measure_share(few, known.keys, count)
    share = measured.share.float()
    sink = share.new_zeros(batch, heads)
    if measured.sink is not None:
        sink = torch.einsum("bhq,bq->bh", measured.sink.float(), weight)
    labels = known.keys.to(share.device).expand(batch, keys)
    hot = (labels[..., None] == torch.arange(count, device=share.device)).float()
    block = BatchRecord(torch.einsum("bhqm,bq->bhm", share, weight), sink, weight.sum(dim=1), hot.sum(dim=1))
    if known.queries is not None:
        queries = known.queries.to(share.device).expand(batch, -1)
        queries = queries if rows.index is None else queries.gather(1, rows.index)
        one_hot = (queries[..., None] == torch.arange(count, device=share.device)).float() * weight[..., None]
        block.by_query = torch.einsum("bhqm,bqn->bhnm", share, one_hot)
        block.query_count = one_hot.sum(dim=1)
    if with_tokens:
        block.tokens, block.labels, block.start = key_mass(few, weight), labels, known.start
    return block
