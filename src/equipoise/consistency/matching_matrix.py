"""Soft matching matrices of two token sets: row softmax or Sinkhorn, with an optional dustbin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..tokens.masks import bool_mask


def soft_matching(
    scores: Float[Tensor, "... row column"],
    *,
    rows: Bool[Tensor, "... row"] | None = None,
    columns: Bool[Tensor, "... column"] | None = None,
    sinkhorn: int = 0,
    dustbin: float | None = None,
) -> Float[Tensor, "... row column"]:
    """Computes a soft matching: softmax over columns, or ``sinkhorn`` alternating normalizations of rows and columns.

    Args:
        scores: logits.
        rows, columns: True for valid tokens; the entries of others are 0.
        sinkhorn: number of iterations, in the log domain.
        dustbin: logit of an additional row and column for unmatched tokens, which are removed from the result; rows
            then sum to at most 1.

    Returns:
        (..., row, column); rows sum to 1 (without a dustbin), and are 0 for padding.
    """
    for name, mask, dim in (("rows", rows, -1), ("columns", columns, -2)):
        if mask is not None:
            bool_mask(mask, f"soft_matching {name}", "a boolean mask (..., row) or (..., column)")
            scores = scores.masked_fill(~mask.unsqueeze(dim), -math.inf)
    if dustbin is not None:
        scores = F.pad(scores, (0, 1, 0, 1), value=dustbin)
    matching = _sinkhorn(scores, sinkhorn, dustbin is not None) if sinkhorn else _softmax(scores)
    if dustbin is not None:
        matching = matching[..., :-1, :-1]
    return matching if rows is None else matching * rows[..., None]


def _softmax(scores: Tensor) -> Tensor:
    blind = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


def _sinkhorn(scores: Tensor, rounds: int, dustbin: bool) -> Tensor:
    """Runs Sinkhorn iterations in the log domain; the row and column of the dustbin are not normalized."""
    lowest = torch.finfo(scores.dtype).min / 4
    scores = scores.clamp(min=lowest)
    inner = slice(None, -1) if dustbin else slice(None)
    for _ in range(rounds):
        for dim in (-2, -1):
            total = scores.logsumexp(dim=dim, keepdim=True)
            # Rows and columns without valid entries are not normalized to a sum of 1.
            total = total.masked_fill(total <= lowest / 2, 0.0)
            part = total[..., inner, :] if dim == -1 else total[..., inner]
            free = torch.zeros_like(total)
            if dim == -1:
                free[..., inner, :] = part
            else:
                free[..., inner] = part
            scores = scores - free
    return scores.exp().masked_fill(scores <= lowest / 2, 0.0)
