"""InfoNCE: partners are told from all other pairs of the batch, by a softmax over each row and column (spec 7.1)."""

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
    """The mean of both directions' cross entropies between partners and the softmax of scaled cosines.

    ``Z = scale a b^T`` and ``L = 1/2 [CE(Z, t) + CE(Z^T, t)]``, t the partners, in equal parts where there are several.

    Args:
        a, b: (batch, dim), normalized; row i of one is the partner of row i of the other.
        scale: s, the inverse of a temperature; it multiplies.
        positives: (batch, batch), True = partners. The diagonal by default; ``same_ids(ids)`` for captions that occur
            twice, which would be false negatives.
        ignored: (batch, batch), True = counts neither as partner nor as negative. Partners are never ignored.
        smoothing: part of the target that is spread evenly over all pairs that count.
        hard: beta; negatives weigh ``w_ij`` proportional to ``exp(beta Z_ij)``, with mean 1. 0 is InfoNCE.
        top_k: only so many nearest negatives of each row count; None means all.

    Returns:
        The loss, in float32 or better. log(batch) is what chance costs, 0 what a perfect match costs at infinite
        scale. A row without partner does not count, and one without negative costs 0 with gradient 0: so does a batch
        of one, or of one id. It falls with the batch's size too: compare only equal batches.

    Raises:
        ShapeError: a and b that do not fit, no pair at all, masks of another shape. ConfigError: options out of range.

    Reference: Radford et al., CLIP (ICML 2021), Figure 3; Robinson et al. (ICLR 2021) for ``hard``; spec 7.1, 7.3.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), scale=1.0)
        tensor(0.3133)
    """
    check_pair(a, b, "info_nce")
    check_options("info_nce", smoothing, hard, top_k)
    logits = similarity_logits(a, b, scale)
    if positives is None and ignored is None and not hard and top_k is None:
        # One partner each needs no masks, and a third of the memory.
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
    for turn in (lambda matrix: matrix, lambda matrix: matrix.T):
        losses, counted = row_losses(
            turn(logits), turn(positives), ignored=None if ignored is None else turn(ignored),
            smoothing=smoothing, hard=hard, top_k=top_k,
        )  # fmt: skip
        directions.append(losses.sum() / counted.sum().clamp(min=1))
    return (directions[0] + directions[1]) / 2


def single_positive_loss(
    logits: Float[Tensor, "row column"], partner: Int[Tensor, " row"], smoothing: float = 0.0
) -> Float[Tensor, " row"]:
    """``row_losses`` where every row has one partner and all columns count.

    Example:
        >>> one_partner(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor([1.3863, 1.3863])
    """
    return F.cross_entropy(logits, partner, label_smoothing=smoothing, reduction="none")


def row_losses(
    logits: Float[Tensor, "row column"],
    positives: Bool[Tensor, "row column"],
    *,
    ignored: Bool[Tensor, "row column"] | None = None,
    smoothing: float = 0.0,
    hard: float = 0.0,
    top_k: int | None = None,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """The cross entropy of every row, and which rows have a partner; 0 for those without a partner or a negative.

    In float32 or better. The options are those of ``info_nce``.

    Example:
        >>> row_losses(torch.zeros(2, 4), torch.eye(2, 4, dtype=torch.bool))[0]
        tensor([1.3863, 1.3863])
    """
    logits = at_least_float32(logits)
    negatives = ~positives if ignored is None else ~positives & ~ignored
    # What does not count must not count by being NaN either.
    logits = logits if ignored is None else logits.masked_fill(ignored & ~positives, 0.0)
    counted = positives.any(dim=1)
    nothing = ~(counted & negatives.any(dim=1))
    if hard:
        logits = logits + hard_negative_log_weights(logits, negatives, hard)
    if top_k is not None:
        negatives = nearest_negatives(logits, negatives, top_k)
    kept = positives | negatives
    # The lowest finite number, since rows in which nothing counts must not make NaN in the gradient.
    log_p = logits.masked_fill(~kept, torch.finfo(logits.dtype).min).log_softmax(dim=1).masked_fill(~kept, 0.0)
    target = _even(positives, log_p.dtype)
    if smoothing:
        target = (1 - smoothing) * target + smoothing * _even(kept, log_p.dtype)
    losses = -(target * log_p).sum(dim=1)
    return losses.masked_fill(nothing, 0.0), counted


def _even(mask: Bool[Tensor, "row column"], dtype: torch.dtype) -> Float[Tensor, "row column"]:
    """What is True, in parts that add up to 1 in each row."""
    parts = mask.to(dtype)
    return parts / parts.sum(dim=1, keepdim=True).clamp(min=1)


def check_options(who: str, smoothing: float, hard: float, top_k: int | None) -> None:
    """Whether the options of ``info_nce`` are in range."""
    if not 0 <= smoothing < 1:
        raise ConfigError(who, expected="smoothing in [0, 1)", got=f"smoothing = {smoothing}")
    if hard < 0:
        raise ConfigError(who, expected="hard >= 0", got=f"hard = {hard}")
    if top_k is not None and top_k < 1:
        raise ConfigError(who, expected="top_k >= 1 or None", got=f"top_k = {top_k}")


class InfoNCE(PairLoss):
    """InfoNCE with a learned scale over any number of modalities and processes.

    ``L = mean over pairs of modalities of info_nce(u_m, u_n, scale=s)`` with ``s = exp(t)``, t learned. With several
    processes every row is compared with those of all, and value and gradients are those of one process that has the
    whole batch, when gradients are averaged as data-parallel training does.

    Args:
        scale: s at the start, 1 / 0.07 as CLIP.
        max_scale: t is held at log(max_scale) or below.
        learn: False keeps s.
        anchor: compare this modality with each other one, and these not among themselves; None compares all pairs.
        widths, dim: name -> width of vectors that still have to be brought to a common ``dim``, by a linear layer each.
        smoothing, hard, top_k: as in ``info_nce``.
        gather: False compares samples within this process alone, as one that evaluates while others wait must.
        duplicates: what pairs of one id are that are not the same sample: ``"positive"`` partners, or ``"ignore"``.

    Raises:
        ConfigError: options out of range; in ``forward``, fewer than two modalities or an anchor that is not there.
        ShapeError: in ``forward``, vectors that do not fit each other.

    Reference: Radford et al., CLIP (ICML 2021); spec 7.1.
    Differs from the released code in: vectors are normalized here; any number of modalities; samples that lack one are
    left out of its pairs.

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
        for here, all_there in ((pair.a, pair.all_b), (pair.b, pair.all_a)):
            logits = similarity_logits(here, all_there, scale)
            if plain:
                partner = torch.searchsorted(pair.all_rows, pair.rows)
                total = total + single_positive_loss(logits, partner, self.options["smoothing"]).sum()
                continue
            positives = same_ids(pair.ids, pair.all_ids)
            if self.duplicates == "ignore":
                ignored, positives = positives, same_ids(pair.rows, pair.all_rows)
            total = total + row_losses(logits, positives, ignored=ignored, **self.options)[0].sum()
        return total / (2 * len(pair.all_a))
