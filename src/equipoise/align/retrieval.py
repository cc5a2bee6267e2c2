"""Finding by similarity: ranks of what is relevant, and the numbers made of them (spec 7.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError, unknown_name

Ties = Literal["average", "optimistic", "pessimistic"]
PART = {"average": 0.5, "optimistic": 0.0, "pessimistic": 1.0}

Similarity = Float[Tensor, "query item"]
Relevant = Bool[Tensor, "query item"]


def ranks(
    similarity: Similarity, relevant: Relevant | None = None, *, ties: Ties = "average"
) -> Float[Tensor, " query"]:
    """The rank of the best relevant item of each query, 1 = first.

    ``1 + #{others that are more similar} + 1/2 #{others that are equally similar}``, others being irrelevant ones. With
    ties counted so, a model that says the same of everything is at chance, and not perfect.

    Args:
        similarity: (query, item).
        relevant: (query, item), True = should be found; the diagonal by default.
        ties: half of them come first by default; ``"optimistic"`` none, ``"pessimistic"`` all.

    Returns:
        (query,) float64 ranks; queries without any relevant item are left out.

    Raises:
        ShapeError: sizes that do not fit, no query or nothing relevant at all. NonFiniteError: NaN or infinity among
            the similarities. ConfigError: an unknown treatment of ties.

    Reference: spec 7.10.

    Example:
        >>> ranks(torch.tensor([[0.9, 0.5], [0.7, 0.7]]))
        tensor([1.0000, 1.5000], dtype=torch.float64)
    """
    ahead, relevant = _ahead(similarity, relevant, ties, "ranks")
    best = ahead.masked_fill(~relevant, torch.inf).amin(dim=1)
    return 1 + best[relevant.any(dim=1)]


def recall_at_k(
    similarity: Similarity, k: int = 1, *, relevant: Relevant | None = None, ties: Ties = "average"
) -> float:  # fmt: skip
    """The share of queries of which a relevant item is among the first k; chance is k / items for one relevant each.

    The other arguments and the errors are those of ``ranks``.

    Raises:
        ConfigError: k < 1.

    Example:
        >>> recall_at_k(torch.tensor([[0.9, 0.5], [0.7, 0.6]]), 1)
        0.5
    """
    if k < 1:
        raise ConfigError("recall_at_k", expected="k >= 1", got=f"k = {k}")
    return float((ranks(similarity, relevant, ties=ties) <= k).double().mean())


def median_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The median of ``ranks``, the mean of the two middle ones for an even number.

    Example:
        >>> median_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        1.5
    """
    return float(ranks(similarity, relevant, ties=ties).quantile(0.5))


def mean_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The mean of ``ranks``.

    Example:
        >>> mean_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        1.5
    """
    return float(ranks(similarity, relevant, ties=ties).mean())


def mean_reciprocal_rank(similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average") -> float:
    """The mean of 1 / rank.

    Example:
        >>> mean_reciprocal_rank(torch.tensor([[0.9, 0.5], [0.7, 0.6]]))
        0.75
    """
    return float(ranks(similarity, relevant, ties=ties).reciprocal().mean())


def mean_average_precision(
    similarity: Similarity, *, relevant: Relevant | None = None, ties: Ties = "average"
) -> float:  # fmt: skip
    """The mean over queries of the mean over their relevant items of the precision there.

    The i-th relevant item has ``i`` relevant and ``n_i`` irrelevant ones up to it, and precision ``i / (i + n_i)``;
    ties count in n_i as in ``ranks``. With one relevant item each it is the mean reciprocal rank.

    Example:
        >>> relevant = torch.tensor([[True, False, True]])
        >>> round(mean_average_precision(torch.tensor([[0.9, 0.5, 0.1]]), relevant=relevant), 4)
        0.8333
    """
    ahead, relevant = _ahead(similarity, relevant, ties, "mean_average_precision")
    # Relevant items in their order: the further down, the more irrelevant ones are ahead.
    ordered = ahead.masked_fill(~relevant, torch.inf).sort(dim=1).values
    number = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    precision = number / (number + ordered)
    counts = relevant.sum(dim=1)
    average = precision.sum(dim=1) / counts.clamp(min=1)
    return float(average[counts > 0].mean())


@dataclass(frozen=True)
class Retrieval:
    """How well one side finds the other.

    Attributes:
        recall: k -> share of queries found among the first k.
        median_rank, mean_rank: 1 is best.
        mean_reciprocal_rank, mean_average_precision: in (0, 1].
        chance: k -> the recall of a model that knows nothing.
        queries, items: how many.
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
    """All of these numbers both ways: rows find columns, and columns find rows.

    Args:
        similarity: (a, b).
        relevant: (a, b), True = belong together; the diagonal by default.
        k: of the recalls.
        ties: as in ``ranks``.

    Example:
        >>> there, back = retrieval(torch.tensor([[0.9, 0.5], [0.7, 0.6]]), k=[1])
        >>> there.recall, back.recall
        ({1: 0.5}, {1: 1.0})
    """
    made = []
    for matrix, mask in ((similarity, relevant), (similarity.mT, None if relevant is None else relevant.mT)):
        found = ranks(matrix, mask, ties=ties)
        recall = {each: float((found <= each).double().mean()) for each in k}
        precision = mean_average_precision(matrix, relevant=mask, ties=ties)
        numbers = float(found.quantile(0.5)), float(found.mean()), float(found.reciprocal().mean()), precision
        made.append(Retrieval(recall, *numbers, _chance(k, mask, matrix), len(found), matrix.shape[1]))
    return made[0], made[1]


def _chance(k: Sequence[int], relevant: Tensor | None, similarity: Tensor) -> dict[int, float]:
    """1 - C(items - r, k) / C(items, k) for r relevant items, mean over queries."""
    items = similarity.shape[1]
    counts = torch.ones(len(similarity)) if relevant is None else relevant.sum(dim=1)
    counts = counts[counts > 0].double().cpu()
    made = {}
    for each in k:
        place = torch.arange(min(each, items), dtype=torch.float64)
        missed = ((items - counts[:, None] - place).clamp(min=0) / (items - place)).prod(dim=1)
        made[each] = float((1 - missed).mean())
    return made


def _ahead(similarity: Tensor, relevant: Tensor | None, ties: str, who: str) -> tuple[Tensor, Tensor]:
    """How many irrelevant items come before each item, (query, item) float64, and what is relevant."""
    if ties not in PART:
        raise unknown_name(who, "treatment of ties", str(ties), PART)
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
    scores = (scores.cpu() if scores.is_mps else scores).double().contiguous()
    relevant = relevant.to(scores.device)
    wrong = scores.masked_fill(relevant, -torch.inf).sort(dim=1).values
    below = torch.searchsorted(wrong, scores, right=False)
    upto = torch.searchsorted(wrong, scores, right=True)
    return (scores.shape[1] - upto) + PART[ties] * (upto - below).double(), relevant
