"""Ranking with ties: items sorted by similarity, groups of tied items, and expectations over their orders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...errors import NonFiniteError, ShapeError, unknown_name

Similarity = Float[Tensor, "query item"]
Relevant = Bool[Tensor, "query item"]
Ties = Literal["average", "optimistic", "pessimistic"]
TIES = ("average", "optimistic", "pessimistic")
CHUNK = 2**22
"""Maximum number of values in memory while computing the distribution of a median."""


@dataclass(frozen=True)
class Ranking:
    """The items of each query in descending order of similarity; queries without a relevant item are excluded.

    Every tensor is (query, item), at the item's position in the sorted list. Equal similarities form one group.

    Attributes:
        relevant: whether the item is relevant.
        start: number of items before the item's group.
        size: number of items in the group.
        hits: number of relevant items in the group.
        earlier: number of relevant items before the group.
    """

    relevant: Bool[Tensor, "query item"]
    start: Int[Tensor, "query item"]
    size: Int[Tensor, "query item"]
    hits: Int[Tensor, "query item"]
    earlier: Int[Tensor, "query item"]

    @property
    def first(self) -> FirstHit:
        """The distribution of each query's rank of the first relevant item."""
        index = self.relevant.int().argmax(dim=1, keepdim=True)
        start, size, hits = (values.gather(1, index)[:, 0].cpu() for values in (self.start, self.size, self.hits))
        return FirstHit(start, size - hits, hits)

    def average_precision(self) -> Float[Tensor, " query"]:
        """The expected average precision of each query.

        Position i of a group of n items, r of them relevant, with a items before it and b relevant ones among those:
        the item there is relevant with probability r / n, and then the precision is expected to be
        ``(b + 1 + (i - 1) (r - 1) / (n - 1)) / (a + i)`` (McSherry and Najork, ECIR 2008).
        """
        position = torch.arange(self.start.shape[1], device=self.start.device) - self.start
        others = position * (self.hits - 1).double() / (self.size - 1).clamp(min=1)
        precision = (self.earlier + 1 + others) / (self.start + position + 1)
        return (self.hits / self.size.double() * precision).sum(dim=1) / self.relevant.sum(dim=1)


@dataclass(frozen=True)
class FirstHit:
    """The rank of the first relevant item of each query: ``ahead`` items come first, then the group that has it.

    Attributes:
        ahead: (query,) items before the group.
        misses, hits: (query,) irrelevant and relevant items in the group, in random order.
    """

    ahead: Int[Tensor, " query"]
    misses: Int[Tensor, " query"]
    hits: Int[Tensor, " query"]

    @cached_property
    def missed(self) -> Float[Tensor, "query place"]:
        """The probability that the first 0, 1, 2, ... items of the group are all irrelevant (hypergeometric)."""
        drawn = torch.arange(int(self.misses.max()) + 1)
        left = (self.misses[:, None] - drawn).clamp(min=0).double()
        return F.pad((left / (left + self.hits[:, None])).cumprod(dim=1), (1, 0), value=1.0)

    def mean(self) -> Float[Tensor, " query"]:
        """The expected rank: the first of r items among n in random order is expected at (n + 1) / (r + 1)."""
        return self.ahead + (self.misses + self.hits + 1).double() / (self.hits + 1)

    def reciprocal(self) -> Float[Tensor, " query"]:
        """The expected reciprocal rank."""
        rank = self.ahead[:, None] + torch.arange(1, self.missed.shape[1])
        return ((self.missed[:, :-1] - self.missed[:, 1:]) / rank).sum(dim=1)

    def within(self, k: Int[Tensor, " k"]) -> Float[Tensor, "query k"]:
        """The probability that the rank is at most k."""
        drawn = (k - self.ahead[:, None]).clamp(0, self.missed.shape[1] - 1)
        return 1 - self.missed.gather(1, drawn)

    def median(self) -> float:
        """The expected median over queries, whose tie orders are independent of each other."""
        middle = len(self.ahead) // 2
        return (self._smallest(middle + 1) + self._smallest(len(self.ahead) - middle)) / 2

    def _smallest(self, order: int) -> float:
        """The expected value of the order-th smallest rank: ``sum_v P(fewer than that many ranks are <= v)``."""
        low, high = self.ahead + 1, self.ahead + self.misses + 1
        least, most = (int(ranks.sort().values[order - 1]) for ranks in (low, high))
        if least == most:
            return float(least)
        # Between these bounds some ranks are certain; the others are counted by the distribution of their number.
        open_ = (low < most) & (high > least)
        needed = order - int((high <= least).sum())
        queries = FirstHit(self.ahead[open_], self.misses[open_], self.hits[open_])
        size = max(1, CHUNK // int(open_.sum()))
        total = 0.0
        for values in torch.arange(least, most).split(size):
            total += float(_fewer_than(needed, queries.within(values).T).sum())
        return least + total


def similarities(a: Float[Tensor, "query dim"], b: Float[Tensor, "item dim"]) -> Similarity:
    """Inner products, computed in float64 and rounded to float32, so that equal vectors have equal similarities.

    In float32, rounding depends on the position of a row in the matrix, so equal vectors could get different values.

    Example:
        >>> similarities(torch.eye(2), torch.ones(2, 2))
        tensor([[1., 1.],
                [1., 1.]])
    """
    return (a.double() @ b.double().T).float()


def sort_items(similarity: Similarity, relevant: Relevant | None, ties: str, who: str) -> Ranking:
    """Sorts the items of each query, and finds the groups of equal items.

    Only exactly equal similarities are ties. ``"optimistic"`` and ``"pessimistic"`` order each group instead, relevant
    items first or last, so that every item is its own group.
    """
    scores, relevant = _checked(similarity, relevant, ties, who)
    has_relevant = relevant.any(dim=1)
    scores, relevant = scores[has_relevant], relevant[has_relevant]
    if ties != "average":
        order = relevant.int().argsort(dim=1, descending=ties == "optimistic", stable=True)
        scores, relevant = scores.gather(1, order), relevant.gather(1, order)
    scores, order = scores.neg().sort(dim=1, stable=True)
    relevant = relevant.gather(1, order)
    if ties == "average":
        start, end = (torch.searchsorted(scores, scores, right=right) for right in (False, True))
    else:
        start = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape).contiguous()
        end = start + 1
    counts = F.pad(relevant.cumsum(dim=1), (1, 0))
    earlier = counts.gather(1, start)
    return Ranking(relevant, start, end - start, counts.gather(1, end) - earlier, earlier)


def _fewer_than(needed: int, p: Float[Tensor, "value query"]) -> Float[Tensor, " value"]:
    """P(fewer than ``needed`` of independent events of probabilities p happen), for each row."""
    expected = p.sum(dim=1)
    # Hoeffding: further from the mean than this, the probability is 0 or 1 in float64.
    margin = math.sqrt(20 * p.shape[1])
    result = (expected < needed).double()
    near = (expected - needed).abs() <= margin
    result[near] = _count_distribution(p[near])[:, :needed].sum(dim=1)
    return result


def _count_distribution(p: Float[Tensor, "value query"]) -> Float[Tensor, "value count"]:
    """The distribution of the number of events, by multiplying generating functions (1 - p) + p x in pairs."""
    factors = torch.stack([1 - p, p], dim=-1)
    while factors.shape[1] > 1:
        if factors.shape[1] % 2:
            one = torch.zeros_like(factors[:, :1])
            one[..., 0] = 1.0
            factors = torch.cat([factors, one], dim=1)
        size = 2 * factors.shape[-1] - 1
        left, right = (torch.fft.rfft(part, n=size) for part in (factors[:, ::2], factors[:, 1::2]))
        factors = torch.fft.irfft(left * right, n=size)
    return factors[:, 0]


def _checked(similarity: Tensor, relevant: Tensor | None, ties: str, who: str) -> tuple[Tensor, Tensor]:
    """Validates similarities and relevance; returns them as float64 and a boolean mask."""
    if ties not in TIES:
        raise unknown_name(who, "treatment of ties", str(ties), TIES)
    if similarity.ndim != 2 or (relevant is None and similarity.shape[0] != similarity.shape[1]):
        raise ShapeError(
            who, expected="similarities (query, item), square where relevant is not given",
            got=f"shape {tuple(similarity.shape)}",
        )  # fmt: skip
    if relevant is None:
        relevant = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if relevant.shape != similarity.shape or relevant.dtype != torch.bool:
        raise ShapeError(
            f"{who} relevant", expected=f"a boolean mask (query, item) = {tuple(similarity.shape)}",
            got=f"{tuple(relevant.shape)}, {relevant.dtype}",
        )  # fmt: skip
    if not bool(relevant.any()):
        raise ShapeError(who, expected="at least one relevant item", got="none", fix="Is the split empty?")
    if not bool(similarity.isfinite().all()):
        raise NonFiniteError(who, expected="finite similarities", got="NaN or infinity", fix="Mask samples without it.")
    scores = similarity.detach()
    scores = (scores.cpu() if scores.is_mps else scores).double()
    return scores, relevant.to(scores.device)
