"""AUROC and FPR95 for out-of-distribution detection."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError

Positive = Literal["ood", "id"]


def auroc(inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"]) -> float:
    """Computes the probability that a random score of ``inside`` exceeds one of ``outside``; ties count half.

    Exact, by sorting in O(n log n). 0.5 is chance.

    Args:
        inside, outside: (sample,) scores, higher means more in-distribution.

    Raises:
        ShapeError: scores are not a vector with at least one entry. NonFiniteError: a score is NaN.

    Example:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    inside, outside = _rows(inside, outside, "auroc")
    outside = outside.sort().values
    below = torch.searchsorted(outside, inside).sum() + torch.searchsorted(outside, inside, right=True).sum()
    return int(below) / (2 * len(inside) * len(outside))


def fpr95(inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"], *, positive: Positive = "ood") -> float:
    """Computes the false positive rate at a true positive rate of at least 95 %.

    ``"ood"``: out-of-distribution samples are the positives and have low scores. The threshold is the lowest one that
    detects at least 95 % of them; the result is the fraction of in-distribution samples at or below it. ``"id"``:
    in-distribution samples are the positives and have high scores; the result is the fraction of out-of-distribution
    samples at or above the threshold. Both conventions are in use and differ, so report which one was used.

    Args:
        inside, outside: (sample,) scores, higher means more in-distribution.
        positive: "ood", as in MultiOOD's tables, or "id", as in most others.

    Returns:
        A fraction; lower is better. It depends on a single threshold and is noisy with few samples.

    Raises:
        ConfigError: an unknown convention; other errors as in ``auroc``.

    Reference: Dong et al., "MultiOOD: Scaling Out-of-Distribution Detection for Multiple Modalities" (NeurIPS 2024).

    Example:
        >>> inside, outside = torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.tensor([0.0, 2.0])
        >>> fpr95(inside, outside), fpr95(inside, outside, positive="id")
        (0.25, 0.5)
    """
    if positive not in ("ood", "id"):
        raise ConfigError("fpr95", expected="positive 'ood' or 'id'", got=repr(positive))
    inside, outside = _rows(inside, outside, "fpr95")
    positives, negatives = (outside, inside) if positive == "ood" else (-inside, -outside)
    # Integer arithmetic: ceil(0.95 n) must not depend on the rounding of 0.95.
    count = -(-95 * len(positives) // 100)
    threshold = positives.sort().values[count - 1]
    return int((negatives <= threshold).sum()) / len(negatives)


def _rows(inside: Tensor, outside: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Checks both vectors of scores and returns them in float64."""
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ShapeError(
                f"{who} {name}", expected="scores (sample,) of one or more samples", got=f"shape {tuple(scores.shape)}"
            )
        if bool(scores.isnan().any()):
            raise NonFiniteError(f"{who} {name}", expected="scores without NaN", got=f"{int(scores.isnan().sum())} NaN")
    return inside.double(), outside.double()
