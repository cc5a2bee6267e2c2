"""InfoNCE: cross entropy of the positives in a softmax over each row and column of the similarity matrix."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, unknown_name
from ...tokens.masks import at_least_float32, bool_mask
from .gather import sync_parameter_grad
from .hard_negatives import hard_negative_log_weights, nearest_negatives, same_ids
from .pair_loss import Pair, PairLoss, check_pair, similarity_logits

Duplicates = Literal["positive", "ignore"]
DUPLICATES = ("positive", "ignore")


def info_nce(
    a: Float[Tensor, "batch dim"],
    b: Float[Tensor, "batch dim"],
    *,
    scale: float | Tensor,
    positives: Bool[Tensor, "batch batch"] | None = None,
    ignored: Bool[Tensor, "batch batch"] | None = None,
    smoothing: float = 0.0,
    hard: float = 0.0,
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE loss.

    ``Z = scale a b^T`` and ``L = 1/2 [CE(Z, t) + CE(Z^T, t)]``; t distributes the target equally over the positives.

    Args:
        a, b: (batch, dim), normalized; row i of one is a positive of row i of the other.
        scale: factor s of the logits, the inverse of the temperature.
        positives: (batch, batch), True = positive. The diagonal by default; use ``same_ids(ids)`` for duplicate
            captions, which would otherwise be false negatives.
        ignored: (batch, batch), True = neither positive nor negative. Positives are never ignored.
        smoothing: label smoothing over all pairs that are not ignored.
        hard: beta; negatives have weights ``w_ij`` proportional to ``exp(beta Z_ij)``, with mean 1. 0 is InfoNCE.
        top_k: use only the k nearest negatives of each row; None uses all.

    Returns:
        The loss, in float32 or higher precision: log(batch) at chance, 0 for a perfect match at infinite scale. Rows
        without positives are excluded; rows without negatives have loss 0 and gradient 0, as in a batch of one sample
        or of one id. The loss depends on the batch size: compare only batches of equal size.

    Raises:
        ShapeError: a and b that do not match, an empty batch, masks of another shape. ConfigError: options out of
            range.

    Reference: Radford et al., CLIP (ICML 2021), Figure 3; Robinson et al. (ICLR 2021) for ``hard``.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), scale=1.0)
        tensor(0.3133)
    """
    check_pair(a, b, "info_nce")
    check_options("info_nce", smoothing, hard, top_k)
    logits = similarity_logits(a, b, scale)
    if positives is None and ignored is None and not hard and top_k is None:
        # A single positive per row needs no masks and a third of the memory.
        rows = torch.arange(len(a), device=a.device)
        return (
            single_positive_loss(logits, rows, smoothing).mean()
            + single_positive_loss(logits.T, rows, smoothing).mean()
        ) / 2
    if positives is None:
        positives = torch.eye(len(a), dtype=torch.bool, device=a.device)
    for name, mask in (("positives", positives), ("ignored", ignored)):
        if mask is not None:
            bool_mask(
                mask, f"info_nce {name}", f"a boolean mask of shape (batch, batch) = {tuple(logits.shape)}",
                shape=logits.shape, fix="same_ids(ids) makes one.",
            )  # fmt: skip
    directions = []
    for orient in (lambda matrix: matrix, lambda matrix: matrix.T):
        losses, counted = row_losses(
            orient(logits), orient(positives), ignored=None if ignored is None else orient(ignored),
            smoothing=smoothing, hard=hard, top_k=top_k,
        )  # fmt: skip
        directions.append(losses.sum() / counted.sum().clamp(min=1))
    return (directions[0] + directions[1]) / 2


def single_positive_loss(
    logits: Float[Tensor, "row column"], positive: Int[Tensor, " row"], smoothing: float = 0.0
) -> Float[Tensor, " row"]:
    """``row_losses`` for one positive per row and no ignored columns.

    Example:
        >>> single_positive_loss(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(logits, positive, label_smoothing=smoothing, reduction="none")


def row_losses(
    logits: Float[Tensor, "row column"],
    positives: Bool[Tensor, "row column"],
    *,
    ignored: Bool[Tensor, "row column"] | None = None,
    smoothing: float = 0.0,
    hard: float = 0.0,
    top_k: int | None = None,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Cross entropy of every row, and which rows have a positive; 0 for rows without a positive or a negative.

    Computed in float32 or higher precision. The options are those of ``info_nce``.

    Example:
        >>> row_losses(torch.zeros(2, 4), torch.eye(2, 4, dtype=torch.bool))[0]
        tensor([1.3863, 1.3863])
    """
    logits = at_least_float32(logits)
    negatives = ~positives if ignored is None else ~positives & ~ignored
    # NaN in ignored pairs must not influence the loss.
    logits = logits if ignored is None else logits.masked_fill(ignored & ~positives, 0.0)
    counted = positives.any(dim=1)
    nothing = ~(counted & negatives.any(dim=1))
    if hard:
        logits = logits + hard_negative_log_weights(logits, negatives, hard)
    if top_k is not None:
        negatives = nearest_negatives(logits, negatives, top_k)
    included = positives | negatives
    # Use the lowest finite number instead of -inf, which would produce NaN gradients in rows without pairs.
    log_p = logits.masked_fill(~included, torch.finfo(logits.dtype).min).log_softmax(dim=1).masked_fill(~included, 0.0)
    target = _uniform(positives, log_p.dtype)
    if smoothing:
        target = (1 - smoothing) * target + smoothing * _uniform(included, log_p.dtype)
    losses = -(target * log_p).sum(dim=1)
    return losses.masked_fill(nothing, 0.0), counted


def _uniform(mask: Bool[Tensor, "row column"], dtype: torch.dtype) -> Float[Tensor, "row column"]:
    """Uniform distribution over the True entries of each row."""
    parts = mask.to(dtype)
    return parts / parts.sum(dim=1, keepdim=True).clamp(min=1)


def check_options(who: str, smoothing: float, hard: float, top_k: int | None) -> None:
    """Checks that the options of ``info_nce`` are in range."""
    if not 0 <= smoothing < 1:
        raise ConfigError(who, expected="smoothing in [0, 1)", got=f"smoothing = {smoothing}")
    if hard < 0:
        raise ConfigError(who, expected="hard >= 0", got=f"hard = {hard}")
    if top_k is not None and top_k < 1:
        raise ConfigError(who, expected="top_k >= 1 or None", got=f"top_k = {top_k}")


class InfoNCE(PairLoss):
    """InfoNCE with a learned scale, for any number of modalities and processes.

    ``L = mean over pairs of modalities of info_nce(u_m, u_n, scale=s)`` with ``s = exp(t)``, t learned. With several
    processes every row is compared with the rows of all processes; after averaging gradients as in data-parallel
    training, value and gradients equal those of a single process with the whole batch.

    Args:
        scale: initial value of s; 1 / 0.07 as in CLIP.
        max_scale: t is clamped to at most log(max_scale).
        learn: False freezes s.
        anchor: compare only this modality with every other one; None compares all pairs.
        widths, dim: name -> width of the vectors, to project each modality to a common ``dim`` with a linear layer.
        smoothing, hard, top_k: as in ``info_nce``.
        gather: False compares samples within this process only, for example if only one process evaluates.
        duplicates: treatment of different samples with the same id: ``"positive"`` or ``"ignore"``.

    Raises:
        ConfigError: options out of range; in ``forward``, fewer than two modalities or a missing anchor.
        ShapeError: in ``forward``, vectors that do not match.

    Reference: Radford et al., CLIP (ICML 2021).
    Differs from the released code in: vectors are normalized here; any number of modalities; samples that lack a
    modality are excluded from its pairs.

    Example:
        >>> loss = InfoNCE()
        >>> round(float(loss(torch.eye(2), torch.eye(2)).detach()), 4)
        0.0
        >>> loss({"audio": torch.eye(3), "image": torch.eye(3), "text": torch.eye(3)}).shape
        torch.Size([])
    """

    def __init__(
        self, *, scale: float = 1 / 0.07, max_scale: float = 100.0, learn: bool = True, anchor: str | None = None,
        widths: dict[str, int] | None = None, dim: int | None = None, smoothing: float = 0.0, hard: float = 0.0,
        top_k: int | None = None, duplicates: Duplicates = "positive", gather: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(anchor=anchor, widths=widths, dim=dim, gather=gather)
        check_options("InfoNCE", smoothing, hard, top_k)
        if not 0 < scale <= max_scale:
            raise ConfigError("InfoNCE", expected=f"0 < scale <= max_scale = {max_scale}", got=f"scale = {scale}")
        if duplicates not in DUPLICATES:
            raise unknown_name("InfoNCE", "treatment of duplicates", str(duplicates), DUPLICATES)
        self.max_scale, self.duplicates = max_scale, duplicates
        self.options = {"smoothing": smoothing, "hard": hard, "top_k": top_k}
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)

    def _prepare(self) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))

    def _pair(self, pair: Pair) -> Float[Tensor, ""]:
        scale = sync_parameter_grad(self.log_scale, pair.place).exp()
        total, ignored = pair.a.new_zeros(()), None
        plain = pair.unique and not self.options["hard"] and self.options["top_k"] is None
        for local, gathered in ((pair.a, pair.all_b), (pair.b, pair.all_a)):
            logits = similarity_logits(local, gathered, scale)
            if plain:
                positive = torch.searchsorted(pair.all_rows, pair.rows)
                total = total + single_positive_loss(logits, positive, self.options["smoothing"]).sum()
                continue
            positives = same_ids(pair.ids, pair.all_ids)
            if self.duplicates == "ignore":
                ignored, positives = positives, same_ids(pair.rows, pair.all_rows)
            total = total + row_losses(logits, positives, ignored=ignored, **self.options)[0].sum()
        return total / (2 * len(pair.all_a))
