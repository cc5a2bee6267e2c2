"""Do this picture and this text belong together, and which word comes next: matching and captioning (spec 7.4)."""

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
"""Label of a token that is not to be predicted."""


class MatchingPairs(NamedTuple):
    """Pairs to be judged: partners, each a with a wrong b, each b with a wrong a.

    Attributes:
        a, b: (pair,) which sample's a and which sample's b.
        label: (pair,) 1 = they belong together.
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
    """The 3 batch pairs of a matching step, hard negatives drawn by how similar they are.

    Args:
        logits: (a, b) scaled similarities.
        positives: (a, b) pairs that are no negatives; the diagonal by default.
        generator: of the random numbers.

    Returns:
        MatchingPairs. Samples without any negative (a batch of one) give no wrong pair.

    Reference: ALBEF (NeurIPS 2021), section 3.2; spec 7.3 (a), 7.4.

    Example:
        >>> matching_pairs(torch.zeros(2, 2)).b
        tensor([0, 1, 1, 0, 0, 1])
    """
    rows = torch.arange(len(logits), device=logits.device)
    wrong_b = sample_negatives(logits, positives, generator=generator)
    wrong_a = sample_negatives(logits.T, None if positives is None else positives.T, generator=generator)
    a = torch.cat([rows, rows[wrong_b.valid], wrong_a.index[wrong_a.valid]])
    b = torch.cat([rows, wrong_b.index[wrong_b.valid], rows[wrong_a.valid]])
    return MatchingPairs(a, b, (torch.arange(len(a), device=a.device) < len(rows)).long())


def matching_loss(logits: Float[Tensor, "pair 2"], label: Int[Tensor, " pair"]) -> Float[Tensor, ""]:
    """Cross entropy of "belongs together" (label 1) over the pairs, in float32 or better.

    Where all pairs have one label, as in a batch of one, the term is skipped: 0, or a head would learn to say yes.

    Raises:
        ShapeError: logits that are not (pair, 2), or other labels than 0 and 1 for each.

    Reference: ALBEF (NeurIPS 2021), eq. 3; spec 7.4.

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
    """Two logits for a pair: a linear map of every query's output, averaged over the queries.

    Args:
        dim: width of the queries.

    Reference: BLIP-2 (ICML 2023), section 3.2; spec 7.4.

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
    """Next-token cross entropy: logits at token t against the label of token t + 1, mean over labels that count.

    Args:
        logits: (batch, token, word).
        labels: (batch, token) aligned with the inputs, not yet moved; -100 for padding, prompt and media, as
            ``caption_labels`` and ``splice`` make them.
        smoothing: part of the target that is spread over all words.

    Returns:
        The loss, in float32 or better; 0 with gradient 0 where no label counts. Logits in front of labels that do not
        count have no influence, NaN included. exp of it is the perplexity when smoothing is 0.

    Raises:
        ShapeError: labels that do not fit. ConfigError: smoothing out of range.

    Reference: spec 7.4.

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
    ahead = labels[:, 1:].flatten()
    behind = exact(logits[:, :-1].masked_fill(labels[:, 1:, None] == IGNORED, 0.0)).flatten(0, 1)
    total = F.cross_entropy(behind, ahead, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return total / (ahead != IGNORED).sum().clamp(min=1)


def caption_labels(
    input_ids: Int[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"] | None = None,
    *,
    prompt: int | Int[Tensor, " batch"] = 0,
) -> Int[Tensor, "batch token"]:
    """The input ids, with -100 on padding and on the first ``prompt`` tokens that are no padding.

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
