"""How attention is spread: over keys, over modalities, over samples, and with the quality of the input (spec 8.10)."""

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
    """How much the share of each modality changes from sample to sample.

    Attributes:
        spread: (modality,) standard deviation of the share, mean over heads; NaN where no sample has the modality.
        per_head: (head, modality) the same for each head alone.
        samples: (modality,) how many samples have the modality.
    """

    spread: Float[Tensor, " modality"]
    per_head: Float[Tensor, "head modality"]
    samples: Int[Tensor, " modality"]


@dataclass(frozen=True, eq=False)
class ShareQuality:
    """Whether the share of each modality goes with the quality of its input.

    Attributes:
        r: (modality,) Pearson correlation of share and quality; NaN where it is not defined.
        p: (modality,) its two-sided p-value.
        samples: (modality,) how many samples count.
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
    """Entropy of each query's attention in nats: -sum_j A_ij log A_ij.

    0 where one key gets everything, log(number of keys) where all get the same; exp of it is the number of keys that
    the query really looks at.

    Args:
        attention: (batch, head, query, key) after softmax.
        mask: (batch, key) or (batch, query, key), True = may be seen; all without it.
        normalized: divided by log(number of keys that the query may see), so that it lies in [0, 1]. A causal mask must
            be given then.

    Returns:
        (batch, head, query), in at least float32. NaN for a query without attention, and normalized also for one that
        may see a single key, which has no choice.

    Raises:
        ShapeError: attention or mask that do not fit.

    Low entropy on a class token or a comma says nothing of modalities; ``share_entropy`` does.

    Reference: spec 8.10.

    Example:
        >>> attention_entropy(torch.tensor([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]]))
        tensor([[[0.6931, 0.0000]]])
    """
    (attention,) = attention_of([attention], "attention_entropy")
    seen = key_mask(mask, attention, "attention_entropy")[:, None]
    kept = torch.where(seen, attention, 0.0)
    entropy = torch.special.entr(kept).sum(dim=-1).masked_fill((kept == 0).all(dim=-1), torch.nan)
    return entropy / seen.sum(dim=-1).to(entropy).log() if normalized else entropy


def share_entropy(share: Float[Tensor, "*batch modality"], *, normalized: bool = False) -> Float[Tensor, "*batch"]:
    """Entropy in nats of how attention is divided among modalities: -sum_m p_m log p_m with p = share / sum(share).

    What special tokens get is left out. 0 where one modality gets everything, log N where all N get the same.

    Args:
        share: (..., modality).
        normalized: divided by log N, so that it lies in [0, 1]; NaN for N = 1.

    Returns:
        (...), in at least float32. NaN where no modality gets anything.

    Raises:
        ShapeError: a share without modalities.

    An even division is no aim in itself: it may be a model that does not look at its input.

    Reference: spec 8.10.

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
    """Dynamic adaptivity: std_i share_i^m, the standard deviation over samples of each modality's share.

    Args:
        share: (sample, head, modality); NaN where a sample lacks the modality, which leaves it out.

    Returns:
        ShareSpread, over n and not n - 1 samples, so 0 for a single one. 0 says that attention divides all samples
        alike and fusion is static in all but name. Heads that move against each other cancel in the mean; look at
        ``per_head`` then.

    Raises:
        ShapeError: no sample, or no such shape.

    A spread may come from chance alone. Whether it follows the input, ``share_quality_correlation`` and
    ``noise_response`` tell.

    Reference: spec 8.10.

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
    """Does a modality get more attention in the samples in which it is better? Pearson's r for each modality.

    Args:
        share: (sample, head, modality), of which the mean over heads counts.
        quality: (sample, modality) anything that is larger for better input: a signal-to-noise ratio, the probability
            that the modality's own head gives to the truth.

    Returns:
        ShareQuality. Samples in which share or quality of the modality is NaN do not count for it. r is NaN for fewer
        than three samples, and where one of the two never changes.

    Raises:
        ShapeError: no sample, or shapes that do not fit.

    Shares of two modalities add up, so a modality that never changes may seem to follow the other's quality.

    Reference: spec 8.10.

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
    found, samples = [], []
    for own, better in zip(mean.unbind(dim=1), quality.detach().to(mean).unbind(dim=1), strict=True):
        counts = ~(own.isnan() | better.isnan())
        samples.append(int(counts.sum()))
        found.append(pearson(own[counts], better[counts]))
    r, p = torch.tensor(found, dtype=mean.dtype).reshape(-1, 2).unbind(dim=1)
    return ShareQuality(r, p, torch.tensor(samples))


def checked_share(share: Tensor, who: str) -> Float[Tensor, "sample head modality"]:
    """The share, detached, in at least float32."""
    if share.ndim != 3 or 0 in share.shape[:2] or not share.is_floating_point():
        raise ShapeError(
            f"{who} share",
            expected="a float tensor of shape (sample, head, modality) with samples and heads",
            got=f"shape {tuple(share.shape)}, {share.dtype}",
            fix="Is the split empty? A share without heads is given as share[:, None].",
        )
    return share.detach() if share.dtype == torch.float64 else share.detach().float()


def deviation(values: Float[Tensor, "sample ..."]) -> Tensor:
    """Standard deviation over the n samples that are not NaN; NaN where all are."""
    return (values - values.nanmean(dim=0)).square().nanmean(dim=0).sqrt()
