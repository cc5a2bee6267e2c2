"""Image-text matching and captioning losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError
from ...tokens.masks import bool_mask, zero_loss
from .hard_negatives import sample_negatives
from .pair_loss import exact

IGNORED = -100
"""Label of tokens that are ignored by the loss."""


class MatchingPairs(NamedTuple):
    """Pairs for the matching loss: positives, each a with a negative b, and each b with a negative a.

    Attributes:
        a, b: (pair,) sample indices.
        label: (pair,) 1 = positive.
    """

    a: Int[Tensor, " pair"]
    b: Int[Tensor, " pair"]
    label: Int[Tensor, " pair"]


def matching_pairs(
    logits: Float[Tensor, "batch batch"],
    positives: Bool[Tensor, "batch batch"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> MatchingPairs:
    """Selects 3 batch pairs for the matching loss; hard negatives are sampled by similarity.

    Args:
        logits: (a, b) scaled similarities.
        positives: (a, b) pairs that are not negatives; the diagonal by default.
        generator: random generator.

    Returns:
        MatchingPairs. Samples without negatives (a batch of one) have no negative pair.

    Reference: ALBEF (NeurIPS 2021), section 3.2.

    Example:
        >>> matching_pairs(torch.zeros(2, 2)).b
        tensor([0, 1, 1, 0, 0, 1])
    """
    rows = torch.arange(len(logits), device=logits.device)
    negative_b = sample_negatives(logits, positives, generator=generator)
    negative_a = sample_negatives(logits.T, None if positives is None else positives.T, generator=generator)
    a = torch.cat([rows, rows[negative_b.valid], negative_a.index[negative_a.valid]])
    b = torch.cat([rows, negative_b.index[negative_b.valid], rows[negative_a.valid]])
    return MatchingPairs(a, b, (torch.arange(len(a), device=a.device) < len(rows)).long())


def matching_loss(logits: Float[Tensor, "pair 2"], label: Int[Tensor, " pair"]) -> Float[Tensor, ""]:
    """Binary matching loss: cross entropy over the pairs, in float32 or higher precision.

    The loss is 0 if all pairs have the same label, as in a batch of one: the head would learn a constant output.

    Raises:
        ShapeError: logits that are not (pair, 2), or labels that are not (pair,).

    Reference: ALBEF (NeurIPS 2021), eq. 3.

    Example:
        >>> matching_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0]))
        tensor(0.6931)
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or label.shape != logits.shape[:1]:
        raise ShapeError(
            "matching_loss", expected="logits (pair, 2) and labels (pair,)",
            got=f"{tuple(logits.shape)} and {tuple(label.shape)}",
        )  # fmt: skip
    if not bool((label == 0).any() & (label == 1).any()):
        return zero_loss([logits])
    return F.cross_entropy(exact(logits), label)


class MatchingHead(nn.Module):
    """Matching head: two logits per pair from a linear layer, averaged over the queries.

    Args:
        dim: width of the queries.

    Reference: BLIP-2 (ICML 2023), section 3.2.

    Example:
        >>> MatchingHead(8)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2)

    def forward(self, queries: Float[Tensor, "pair query dim"]) -> Float[Tensor, "pair 2"]:
        return self.linear(queries).mean(dim=1)


def captioning_loss(
    logits: Float[Tensor, "batch token word"], labels: Int[Tensor, "batch token"], *, smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Next-token cross entropy: logits at token t against the label of token t + 1, mean over labels.

    Args:
        logits: (batch, token, word).
        labels: (batch, token) aligned with the inputs (the shift is applied here); -100 for padding, prompt and media,
            as returned by ``caption_labels`` and ``splice``.
        smoothing: label smoothing.

    Returns:
        The loss, in float32 or higher precision; 0 with gradient 0 if all labels are ignored. Logits of ignored labels
        have no influence, even if they are NaN. Without smoothing, exp(loss) is the perplexity.

    Raises:
        ShapeError: labels that do not match. ConfigError: smoothing out of range.

    Example:
        >>> captioning_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 3]]))
        tensor(1.3863)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ShapeError(
            "captioning_loss", expected="logits (batch, token, word) and labels (batch, token)",
            got=f"{tuple(logits.shape)} and {tuple(labels.shape)}",
        )  # fmt: skip
    if not 0 <= smoothing < 1:
        raise ConfigError("captioning_loss", expected="smoothing in [0, 1)", got=f"smoothing = {smoothing}")
    target = labels[:, 1:].flatten()
    shifted = exact(logits[:, :-1].masked_fill(labels[:, 1:, None] == IGNORED, 0.0)).flatten(0, 1)
    total = F.cross_entropy(shifted, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def caption_labels(
    input_ids: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"] | None = None,
    *,
    prompt: int | Int[Tensor, " batch"] = 0,
) -> Int[Tensor, "batch token"]:
    """Labels for ``captioning_loss``: the input ids with -100 on padding and on the first ``prompt`` valid tokens.

    Example:
        >>> caption_labels(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]]), prompt=1)
        tensor([[-100,    6,    7, -100]])
    """
    if mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    expected = f"a boolean mask (batch, token) = {tuple(input_ids.shape)}"
    bool_mask(mask, "caption_labels mask", expected, shape=input_ids.shape)
    prompt = torch.as_tensor(prompt, device=input_ids.device).reshape(-1, 1)
    return input_ids.masked_fill(~mask | (mask.cumsum(dim=1) <= prompt), IGNORED)
