"""Hard negatives: sampled, weighted, or the k nearest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError
from ...tokens.masks import at_least_float32, bool_mask, zero_loss


def same_ids(
    ids: Int[Tensor, " row"], others: Int[Tensor, " column"] | None = None
) -> Bool[Tensor, "row column"]:  # fmt: skip
    """Mask of the pairs with equal ids, for example one image with five captions as five rows of one id.

    Example:
        >>> same_ids(torch.tensor([4, 7, 4])).int()
        tensor([[1, 0, 1],
                [0, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    return ids[:, None] == (ids if others is None else others)[None]


class SampledNegatives(NamedTuple):
    """Sampled negatives.

    Attributes:
        index: (row,) column of a negative for each row; 0 if there is none.
        valid: (row,) False for rows without negatives.
    """

    index: Int[Tensor, " row"]
    valid: Bool[Tensor, " row"]


def sample_negatives(
    logits: Float[Tensor, "row column"],
    positives: Bool[Tensor, "row column"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> SampledNegatives:
    """Samples one negative per row with probability ``p_ij = exp(Z_ij) / sum over negatives of exp(Z_i.)``.

    Not differentiable. ``valid`` is False for rows without negatives, as in a batch of one.

    Args:
        logits: (row, column); pass ``logits.T`` to sample rows for columns.
        positives: (row, column) pairs that are never sampled: the diagonal by default, ``same_ids(ids)`` if there are
            duplicates.
        generator: random generator on the device of the logits.

    Raises:
        ShapeError: positives of another shape, or None for a matrix that is not square.

    Reference: ALBEF (NeurIPS 2021), section 3.2; BLIP-2 (ICML 2023).

    Example:
        >>> sample_negatives(torch.zeros(2, 2)).index
        tensor([1, 0])
    """
    positives = _partners(logits, positives, "sample_negatives")
    # Negatives with a logit of -inf must still be preferred over positives.
    lowest = torch.finfo(torch.float32).min / 2
    scores = logits.detach().float().clamp(min=lowest).masked_fill(positives, -torch.inf)
    valid = (~positives).any(dim=1)
    if scores.numel() == 0:
        return SampledNegatives(torch.zeros(len(scores), dtype=torch.int64, device=scores.device), valid)
    # Gumbel-max trick: the argmax of Z + Gumbel noise is distributed as softmax(Z).
    noise = torch.empty_like(scores).exponential_(generator=generator).clamp(min=1e-20).log()
    return SampledNegatives((scores - noise).argmax(dim=1).masked_fill(~valid, 0), valid)


def hard_negative_log_weights(
    logits: Float[Tensor, "row column"], negatives: Bool[Tensor, "row column"], beta: float
) -> Float[Tensor, "row column"]:
    """Computes log w_ij with ``w_ij = exp(beta Z_ij) / mean over negatives of exp(beta Z_i.)``; 0 for other pairs.

    The weights have mean 1 over the negatives of a row, and are all 1 for beta = 0. Differentiable.

    Reference: Robinson et al., Contrastive Learning with Hard Negative Samples (ICLR 2021).

    Example:
        >>> negatives = torch.tensor([[False, True, True]])
        >>> hard_negative_log_weights(torch.tensor([[9.0, 0.0, 3.0]]).log1p(), negatives, 1.0).exp()
        tensor([[1.0000, 0.4000, 1.6000]])
    """
    # Rows without negatives get finite values, whose gradient is discarded.
    candidates = (beta * logits).masked_fill(~negatives, torch.finfo(logits.dtype).min)
    mean = (
        candidates.logsumexp(dim=1, keepdim=True)
        - negatives.sum(dim=1, keepdim=True).clamp(min=1).to(logits.dtype).log()
    )
    return torch.where(negatives, beta * logits - mean, 0.0)


def nearest_negatives(
    logits: Float[Tensor, "row column"], negatives: Bool[Tensor, "row column"], k: int
) -> Bool[Tensor, "row column"]:
    """Mask of the negatives with the k largest logits of each row; negatives that tie with the k-th are included.

    Raises:
        ConfigError: k < 1.

    Example:
        >>> nearest_negatives(torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[False, True, True, True]]), 2)
        tensor([[False, False,  True,  True]])
    """
    if k < 1:
        raise ConfigError("nearest_negatives", expected="k >= 1", got=f"k = {k}")
    if k >= logits.shape[1]:
        return negatives
    scores = logits.detach().masked_fill(~negatives, -torch.inf)
    return negatives & (scores >= scores.topk(k, dim=1).values[:, -1:])


def triplet_loss(
    similarity: Float[Tensor, "row column"],
    positives: Bool[Tensor, "row column"] | None = None,
    *,
    margin: float = 0.2,
) -> Float[Tensor, ""]:
    """Triplet loss: mean over rows of ``max(0, margin + s_i,hardest negative - s_i,hardest positive)``.

    The hardest negative has the largest similarity, the hardest positive the smallest. Rows without a positive or a
    negative are excluded; if no row is left, loss and gradient are 0. Computed in float32 or higher precision.

    Args:
        similarity: (row, column), cosines.
        positives: (row, column) mask; the diagonal by default.
        margin: margin between positives and negatives.

    Raises:
        ShapeError: as in ``sample_negatives``.

    Reference: Faghri et al., VSE++ (BMVC 2018), eq. 6.
    Differs from the paper in: the mean over rows instead of the sum; one direction per call.

    Example:
        >>> triplet_loss(torch.tensor([[0.5, 0.4], [0.0, 0.9]]))
        tensor(0.0500)
    """
    positives = _partners(similarity, positives, "triplet_loss")
    counted = positives.any(dim=1) & (~positives).any(dim=1)
    if not bool(counted.any()):
        return zero_loss([similarity])
    similarity, positives = at_least_float32(similarity)[counted], positives[counted]
    furthest = similarity.masked_fill(~positives, torch.inf).amin(dim=1)
    nearest = similarity.masked_fill(positives, -torch.inf).amax(dim=1)
    return (margin + nearest - furthest).clamp(min=0).mean()


def _partners(scores: Tensor, positives: Tensor | None, who: str) -> Tensor:
    if scores.ndim != 2 or (positives is None and scores.shape[0] != scores.shape[1]):
        raise ShapeError(
            who, expected="scores of shape (batch, batch), or (row, column) with positives",
            got=f"shape {tuple(scores.shape)}",
        )  # fmt: skip
    if positives is None:
        return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return bool_mask(
        positives, f"{who} positives", f"a boolean mask of shape (row, column) = {tuple(scores.shape)}",
        shape=scores.shape, fix="same_ids(ids) makes one.",
    )  # fmt: skip
