"""Hard negatives: which of the wrong partners are almost right, drawn, weighted, or the nearest few (spec 7.3)."""

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
    """Which pairs share an id: one picture with five captions is five rows of one id.

    Example:
        >>> same_ids(torch.tensor([4, 7, 4])).int()
        tensor([[1, 0, 1],
                [0, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    return ids[:, None] == (ids if others is None else others)[None]


class SampledNegatives(NamedTuple):
    """Negatives that were drawn.

    Attributes:
        index: (row,) a wrong partner for each row; 0 where there is none.
        valid: (row,) False for rows that have no wrong partner.
    """

    index: Int[Tensor, " row"]
    valid: Bool[Tensor, " row"]


def sample_negatives(
    logits: Float[Tensor, "row column"],
    positives: Bool[Tensor, "row column"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> SampledNegatives:
    """For each row one wrong column, with probability ``p_ij = exp(Z_ij) / sum over negatives of exp(Z_i.)``.

    Nothing is differentiated. A batch of one has no negatives: ``valid`` is False there, and what needs one is skipped.

    Args:
        logits: (row, column); the columns' turn is ``logits.T``.
        positives: (row, column) partners, never drawn: the diagonal by default, ``same_ids`` where there are
            duplicates.
        generator: of the random numbers, on the logits' device.

    Raises:
        ShapeError: positives of another shape, or none given for unequal sides.

    Reference: ALBEF (NeurIPS 2021), section 3.2; BLIP-2 (ICML 2023); spec 7.3 (a).

    Example:
        >>> sample_negatives(torch.zeros(2, 2)).index
        tensor([1, 0])
    """
    positives = _partners(logits, positives, "sample_negatives")
    # A negative at minus infinity still comes before any partner.
    lowest = torch.finfo(torch.float32).min / 2
    scores = logits.detach().float().clamp(min=lowest).masked_fill(positives, -torch.inf)
    valid = (~positives).any(dim=1)
    if scores.numel() == 0:
        return SampledNegatives(torch.zeros(len(scores), dtype=torch.int64, device=scores.device), valid)
    # The largest of Z + Gumbel noise is distributed as softmax(Z), and needs no normalizer.
    noise = torch.empty_like(scores).exponential_(generator=generator).clamp(min=1e-20).log()
    return SampledNegatives((scores - noise).argmax(dim=1).masked_fill(~valid, 0), valid)


def hard_negative_log_weights(
    logits: Float[Tensor, "row column"], negatives: Bool[Tensor, "row column"], beta: float
) -> Float[Tensor, "row column"]:
    """log w_ij with ``w_ij = exp(beta Z_ij) / mean over negatives of exp(beta Z_i.)``; 0 outside of the negatives.

    The weights have mean 1 over a row's negatives, and are all 1 at beta = 0. Differentiable.

    Reference: Robinson et al., Contrastive Learning with Hard Negative Samples (ICLR 2021); spec 7.3 (b).

    Example:
        >>> negatives = torch.tensor([[False, True, True]])
        >>> log_weights(torch.tensor([[9.0, 0.0, 3.0]]).log1p(), negatives, 1.0).exp()
        tensor([[1.0000, 0.4000, 1.6000]])
    """
    # Rows without negatives get finite numbers, whose gradient is then thrown away.
    kept = (beta * logits).masked_fill(~negatives, torch.finfo(logits.dtype).min)
    mean = kept.logsumexp(dim=1, keepdim=True) - negatives.sum(dim=1, keepdim=True).clamp(min=1).to(logits.dtype).log()
    return torch.where(negatives, beta * logits - mean, 0.0)


def nearest_negatives(
    logits: Float[Tensor, "row column"], negatives: Bool[Tensor, "row column"], k: int
) -> Bool[Tensor, "row column"]:
    """Which negatives are among their row's k largest; ties with the k-th are kept (spec 7.3 (c)).

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
    """Mean over rows of ``max(0, margin + s_i,hardest negative - s_i,hardest positive)``.

    The hardest negative is the largest, the hardest positive the smallest. Rows that lack one of both do not count;
    where none is left the loss is 0 with gradient 0. In float32 or better.

    Args:
        similarity: (row, column), cosines.
        positives: (row, column) partners; the diagonal by default.
        margin: by how much a partner must be closer.

    Raises:
        ShapeError: as ``sample_negatives``.

    Reference: Faghri et al., VSE++ (BMVC 2018), eq. 6; spec 7.3 (d).
    Differs from the paper in: the mean over rows, not the sum, and one direction a call.

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
