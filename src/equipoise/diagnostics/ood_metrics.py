"""How well one number tells two kinds of samples apart: AUROC and FPR95 (spec 8.7)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, ShapeError

Positive = Literal["ood", "id"]


def auroc(inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"]) -> float:
    """Probability that a random score from inside exceeds a random one from outside; equal ones count half.

    Exact, by sorting: O(n log n). 0.5 is chance.

    Args:
        inside, outside: (sample,) scores, higher means more in-distribution.

    Raises:
        ShapeError: scores that are no row of numbers, or none. NonFiniteError: NaN among them.

    Example:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    inside, outside = _rows(inside, outside, "auroc")
    outside = outside.sort().values
    below = torch.searchsorted(outside, inside).sum() + torch.searchsorted(outside, inside, right=True).sum()
    return int(below) / (2 * len(inside) * len(outside))


def fpr95(inside: Float[Tensor, " inside"], outside: Float[Tensor, " outside"], *, positive: Positive = "ood") -> float:
    """What it costs to recognize 95 % of the positives: the part of the negatives that is taken for one.

    ``"ood"``: unknown samples are the positives, found by low scores. The threshold is the first, from below, that
    finds at least 95 % of them; the figure is the part of the known that lies at or below it. ``"id"``: known samples
    are the positives, found by high scores, and the figure is the part of the unknown at or above the threshold. Both
    are in use, and differ; say which.

    Args:
        inside, outside: (sample,) scores, higher means more in-distribution.
        positive: "ood", as in MultiOOD's tables, or "id", as in most others.

    Returns:
        A fraction; less is better. One threshold decides, so with few samples it jumps.

    Raises:
        ConfigError: an unknown convention; others as ``auroc``.

    Reference: Dong et al., "MultiOOD: Scaling Out-of-Distribution Detection for Multiple Modalities" (NeurIPS 2024);
    spec 8.7.

    Example:
        >>> inside, outside = torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.tensor([0.0, 2.0])
        >>> fpr95(inside, outside), fpr95(inside, outside, positive="id")
        (0.25, 0.5)
    """
    if positive not in ("ood", "id"):
        raise ConfigError("fpr95", expected="positive 'ood' or 'id'", got=repr(positive))
    inside, outside = _rows(inside, outside, "fpr95")
    positives, negatives = (outside, inside) if positive == "ood" else (-inside, -outside)
    # In whole numbers: 0.95 n is no float, and the least count that is no less must not depend on how it is rounded.
    wanted = -(-95 * len(positives) // 100)
    threshold = positives.sort().values[wanted - 1]
    return int((negatives <= threshold).sum()) / len(negatives)


def _rows(inside: Tensor, outside: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Two rows of scores of one type."""
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ShapeError(
                f"{who} {name}", expected="scores (sample,) of one or more samples", got=f"shape {tuple(scores.shape)}"
            )
        if bool(scores.isnan().any()):
            raise NonFiniteError(
                f"{who} {name}", expected="scores that are numbers", got=f"NaN for {int(scores.isnan().sum())} of them"
            )
    return inside.double(), outside.double()
