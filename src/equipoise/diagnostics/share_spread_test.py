"""Entropy of attention, variation of shares over samples, and their correlation with input quality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ShapeError
from .model_inputs import attention_of, key_mask
from .noise_test import pearson


@dataclass(frozen=True, eq=False)
class ShareSpread:
    """Standard deviation of the attention shares over samples.

    Attributes:
        spread: (modality,) of the share averaged over heads; NaN without any sample with the modality.
        per_head: (head, modality) of the share of each head.
        samples: (modality,) number of samples with the modality.
    """

    spread: Float[Tensor, " modality"]
    per_head: Float[Tensor, "head modality"]
    samples: Int[Tensor, " modality"]


@dataclass(frozen=True, eq=False)
class ShareQuality:
    """Correlation of the attention share of each modality with the quality of its input.

    Attributes:
        r: (modality,) Pearson correlation of share and quality; NaN if undefined.
        p: (modality,) its two-sided p-value.
        samples: (modality,) number of samples.
    """

    r: Float[Tensor, " modality"]
    p: Float[Tensor, " modality"]
    samples: Int[Tensor, " modality"]


def attention_entropy(
    attention: Float[Tensor, "batch head query key"],
    *,
    mask: Bool[Tensor, "batch *query key"] | None = None,
    normalized: bool = False,
) -> Float[Tensor, "batch head query"]:
    """Computes the entropy of the attention of each query in nats: -sum_j A_ij log A_ij.

    0 if one key has all attention, log(number of keys) for uniform attention; the exponential is the effective number
    of keys.

    Args:
        attention: (batch, head, query, key) after softmax.
        mask: (batch, key) or (batch, query, key), True = visible; all without it.
        normalized: divide by log(number of visible keys of the query), with values in [0, 1]. A causal mask must be
            given in this case.

    Returns:
        (batch, head, query), in at least float32. NaN for a query without attention and, if normalized, for a query
        with a single visible key.

    Raises:
        ShapeError: attention or mask do not fit.

    Low entropy may be due to a class token or punctuation; see ``share_entropy`` for modalities.

    Example:
        >>> attention_entropy(torch.tensor([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]]))
        tensor([[[0.6931, 0.0000]]])
    """
    (attention,) = attention_of([attention], "attention_entropy")
    visible = key_mask(mask, attention, "attention_entropy")[:, None]
    masked = torch.where(visible, attention, 0.0)
    entropy = torch.special.entr(masked).sum(dim=-1).masked_fill((masked == 0).all(dim=-1), torch.nan)
    return entropy / visible.sum(dim=-1).to(entropy).log() if normalized else entropy


def share_entropy(share: Float[Tensor, "*batch modality"], *, normalized: bool = False) -> Float[Tensor, "*batch"]:
    """Computes the entropy of the shares in nats: -sum_m p_m log p_m with p = share / sum(share).

    Attention to special tokens is excluded. 0 if one modality has all attention, log N for uniform shares.

    Args:
        share: (..., modality).
        normalized: divide by log N, with values in [0, 1]; NaN for N = 1.

    Returns:
        (...), in at least float32. NaN if the shares of all modalities are 0.

    Raises:
        ShapeError: a share without modalities.

    Uniform shares are not a goal in themselves: they may not depend on the input at all.

    Example:
        >>> share_entropy(torch.tensor([[0.4, 0.4], [0.0, 0.7]]))
        tensor([0.6931, 0.0000])
    """
    if share.ndim < 1 or share.shape[-1] == 0 or not share.is_floating_point():
        raise ShapeError(
            "share_entropy",
            expected="a float tensor of shape (..., modality)",
            got=f"shape {tuple(share.shape)}, {share.dtype}",
        )
    share = share if share.dtype == torch.float64 else share.float()
    entropy = torch.special.entr(share / share.sum(dim=-1, keepdim=True)).sum(dim=-1)
    return entropy / torch.tensor(float(share.shape[-1])).to(entropy).log() if normalized else entropy


def share_spread(share: Float[Tensor, "sample head modality"]) -> ShareSpread:
    """Computes std_i share_i^m, the standard deviation over samples of the share of each modality.

    Args:
        share: (sample, head, modality); NaN marks samples without the modality, which are excluded.

    Returns:
        ShareSpread with population standard deviations, 0 for a single sample. A value of 0 means that the shares are
        constant and the fusion is effectively static. Opposite changes of heads cancel in the mean; see ``per_head``.

    Raises:
        ShapeError: no sample, or another shape.

    The variation may be unrelated to the input; ``share_quality_correlation`` and ``noise_response`` test this.

    Example:
        >>> share_spread(torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]]])).spread
        tensor([0.2500, 0.2500])
    """
    share = checked_share(share, "share_spread")
    mean = share.mean(dim=1)
    return ShareSpread(deviation(mean), deviation(share), (~mean.isnan()).sum(dim=0))


def share_quality_correlation(
    share: Float[Tensor, "sample head modality"], quality: Float[Tensor, "sample modality"]
) -> ShareQuality:
    """Computes the Pearson correlation of the share of each modality with the quality of its input.

    Args:
        share: (sample, head, modality); the mean over heads is used.
        quality: (sample, modality) any measure that is larger for better input: a signal-to-noise ratio, or the
            probability of the target according to the unimodal head.

    Returns:
        ShareQuality. Samples whose share or quality is NaN are excluded. r is NaN for fewer than three samples, and if
        share or quality is constant.

    Raises:
        ShapeError: no sample, or shapes that do not fit.

    Shares sum to at most 1, so the share of one modality also correlates with the quality of the others.

    Example:
        >>> share = torch.tensor([[[0.2, 0.8]], [[0.4, 0.6]], [[0.9, 0.1]]])
        >>> share_quality_correlation(share, torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])).r
        tensor([0.9707,    nan])
    """
    mean = checked_share(share, "share_quality_correlation").mean(dim=1)
    if quality.shape != mean.shape:
        raise ShapeError(
            "share_quality_correlation quality",
            expected=f"shape (sample, modality) = {tuple(mean.shape)}",
            got=f"shape {tuple(quality.shape)}",
        )
    correlations, samples = [], []
    for values, quality_values in zip(mean.unbind(dim=1), quality.detach().to(mean).unbind(dim=1), strict=True):
        valid = ~(values.isnan() | quality_values.isnan())
        samples.append(int(valid.sum()))
        correlations.append(pearson(values[valid], quality_values[valid]))
    r, p = torch.tensor(correlations, dtype=mean.dtype).reshape(-1, 2).unbind(dim=1)
    return ShareQuality(r, p, torch.tensor(samples))


def checked_share(share: Tensor, who: str) -> Float[Tensor, "sample head modality"]:
    """Returns the share, detached, in at least float32."""
    if share.ndim != 3 or 0 in share.shape[:2] or not share.is_floating_point():
        raise ShapeError(
            f"{who} share",
            expected="a float tensor of shape (sample, head, modality) with samples and heads",
            got=f"shape {tuple(share.shape)}, {share.dtype}",
            fix="Is the split empty? A share without heads is given as share[:, None].",
        )
    return share.detach() if share.dtype == torch.float64 else share.detach().float()


def deviation(values: Float[Tensor, "sample ..."]) -> Tensor:
    """Population standard deviation over samples, ignoring NaN; NaN if all are."""
    return (values - values.nanmean(dim=0)).square().nanmean(dim=0).sqrt()
