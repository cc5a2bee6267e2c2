"""Retrieval metrics: recall, ranks and average precision, as expectations over the orders of tied items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError
from .tie_ranking import Relevant, Similarity, Ties, sort_items


def ranks(
    similarity: Similarity, relevant: Relevant | None = None, *, ties: Ties = "average"
) -> Float[Tensor, " query"]:
    """The expected rank of the first relevant item of each query, 1 = best.

    Items that are exactly as similar as the first relevant one may come in any order, and all orders are equally
    likely. With a items above, t irrelevant and r relevant items in that group, the expected rank is
    ``a + (t + r + 1) / (r + 1)``. Do not compute other metrics from it: they are not linear functions of the rank.
    ``recall_at_k``, ``mean_reciprocal_rank`` and the others are expectations themselves, so that a model with constant
    scores is at chance in each of them.

    Args:
        similarity: (query, item).
        relevant: (query, item), True = relevant; the diagonal by default.
        ties: ``"average"`` over all orders of tied items; ``"optimistic"`` puts relevant items first,
            ``"pessimistic"`` last. Only exactly equal similarities are ties.

    Returns:
        (query,) float64 ranks; queries without a relevant item are excluded.

    Raises:
        ShapeError: sizes that do not match, no query or no relevant item. NonFiniteError: NaN or infinity among the
            similarities. ConfigError: an unknown treatment of ties.

    Example:
        >>> ranks(torch.tensor([[0.9, 0.5], [0.7, 0.7]]))
        tensor([1.0000, 1.5000], dtype=torch.float64)
    """
    return sort_items(similarity, relevant, ties, "ranks").first.mean()


def found_within(
    similarity: Similarity, k: int = 1, *, relevant: Relevant | None = None, ties: Ties = "average"
) -> Float[Tensor, " query"]:
    """Probability for each query that a relevant item is among the first k: 0 or 1 without ties.

    Arguments, excluded queries and errors are those of ``ranks``.

    Raises:
        ConfigError: k < 1.

    Example:
        >>> found_within(torch.tensor([[0.9, 0.5], [0.7, 0.7]]), 1)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    _check_k(k, "found_within")
    return sort_items(similarity, relevant, ties, "found_within").first.within(torch.tensor([k]))[:, 0]


def recall_at_k(
    similarity: Similarity, k: int = 1, *, relevant: Relevant | None = None, ties: Ties = "average"
) -> float:  # fmt: skip
    """The share of queries that have a relevant item among the first k; chance is k / items for one relevant each.

    The other arguments and the errors are those of ``ranks``.

    Raises:
        ConfigError: k < 1.

    Example:
        >>> recall_at_k(torch.tensor([[0.9, 0.5], [0.7, 0.6]]), 1)
        0.5
        >>> recall_at_k(torch.zeros(4, 4), 3)
        0.75
    """
    _check_k(k, "recall_at_k")
    return float(sort_items(similarity, relevant, ties, "recall_at_k").first.within(torch.tensor([k])).mean())


def median_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The expected median over queries of the rank of the first relevant item.

    Each order of equal items, independent between queries, has a median: the mean of the two middle ranks for an
    even number of queries. This is the mean of those medians over all orders, computed exactly from the distribution
    of each query's rank. It is not the median of ``ranks``.

    Example:
        >>> median_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        1.5
    """
    return sort_items(similarity, relevant, ties, "median_rank").first.median()


def mean_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The mean of ``ranks``.

    Example:
        >>> mean_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        1.5
    """
    return float(sort_items(similarity, relevant, ties, "mean_rank").first.mean().mean())


def mean_reciprocal_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The mean over queries of the expected reciprocal rank of the first relevant item.

    Example:
        >>> mean_reciprocal_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        0.75
    """
    return float(sort_items(similarity, relevant, ties, "mean_reciprocal_rank").first.reciprocal().mean())


def mean_average_precision(
    similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average"
) -> float:  # fmt: skip
    """The mean over queries of the expected average precision.

    Average precision is the mean over a query's relevant items of the precision at their rank. With one relevant item
    each it is the reciprocal rank.

    Reference: McSherry and Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of
    Tied Scores (ECIR 2008), for the expectation.

    Example:
        >>> relevant = torch.tensor([[True, False, True]])
        >>> round(mean_average_precision(torch.tensor([[0.9, 0.5, 0.1]]), relevant=relevant), 4)
        0.8333
    """
    return float(sort_items(similarity, relevant, ties, "mean_average_precision").average_precision().mean())


@dataclass(frozen=True)
class Retrieval:
    """Retrieval metrics in one direction; every number is an expectation over the orders of tied items.

    Attributes:
        recall: k -> fraction of queries with a relevant item among the first k.
        median_rank, mean_rank: 1 is best.
        mean_reciprocal_rank, mean_average_precision: in (0, 1].
        chance: k -> the expected recall of a random order.
        queries: number of queries that have a relevant item; the others are excluded.
        items: number of items.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    mean_reciprocal_rank: float
    mean_average_precision: float
    chance: dict[int, float]
    queries: int
    items: int


def retrieval(
    similarity: Similarity, *, relevant: Relevant | None = None, k: Sequence[int] = (1, 5, 10), ties: Ties = "average"
) -> tuple[Retrieval, Retrieval]:
    """Computes all retrieval metrics in both directions: rows as queries, then columns as queries.

    Args:
        similarity: (a, b).
        relevant: (a, b), True = relevant; the diagonal by default.
        k: values of k of the recalls.
        ties: as in ``ranks``.

    Raises:
        ConfigError: a k < 1; the other errors are those of ``ranks``.

    Example:
        >>> forward, backward = retrieval(torch.tensor([[0.9, 0.5], [0.7, 0.6]]), k=[1])
        >>> forward.recall, backward.recall
        ({1: 0.5}, {1: 1.0})
    """
    for each in k:
        _check_k(each, "retrieval")
    results = []
    for matrix, mask in ((similarity, relevant), (similarity.mT, None if relevant is None else relevant.mT)):
        ranking = sort_items(matrix, mask, ties, "retrieval")
        first, precision = ranking.first, float(ranking.average_precision().mean())
        recalls = first.within(torch.tensor(list(k), dtype=torch.long)).mean(dim=0).tolist()
        numbers = first.median(), float(first.mean().mean()), float(first.reciprocal().mean()), precision
        recall = dict(zip(k, recalls, strict=True))
        results.append(Retrieval(recall, *numbers, _chance(k, mask, matrix), len(first.ahead), matrix.shape[1]))
    return results[0], results[1]


def _check_k(k: int, who: str) -> None:
    if k < 1:
        raise ConfigError(who, expected="k >= 1", got=f"k = {k}")


def _chance(k: Sequence[int], relevant: Tensor | None, similarity: Tensor) -> dict[int, float]:
    """1 - C(items - r, k) / C(items, k) for r relevant items, mean over queries."""
    items = similarity.shape[1]
    counts = torch.ones(len(similarity)) if relevant is None else relevant.sum(dim=1)
    counts = counts[counts > 0].double().cpu()
    chance = {}
    for each in k:
        position = torch.arange(min(each, items), dtype=torch.float64)
        missed = ((items - counts[:, None] - position).clamp(min=0) / (items - position)).prod(dim=1)
        chance[each] = float((1 - missed).mean())
    return chance
