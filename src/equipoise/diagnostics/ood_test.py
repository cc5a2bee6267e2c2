"""Out-of-distribution detection by the confidence of a classifier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from .ood_metrics import auroc, fpr95
from .ood_scores import CONFIDENCES, Confidence
from .prediction_collection import collect_predictions
from .task_scores import score_name


@dataclass(frozen=True, eq=False)
class OOD:
    """Separation of in-distribution and out-of-distribution samples by confidence.

    Attributes:
        score: name of the confidence score.
        accuracy: on the in-distribution samples; NaN without targets.
        auroc: probability that an in-distribution sample has a higher confidence than an out-of-distribution sample.
        fpr95: fraction of in-distribution samples rejected when 95 % of the others are (``positive="ood"``).
        fpr95_id: fraction of out-of-distribution samples accepted when 95 % of the others are (``positive="id"``).
        inside, outside: (sample,) confidence of in-distribution and out-of-distribution samples.
    """

    score: str
    accuracy: float
    auroc: float
    fpr95: float
    fpr95_id: float
    inside: Float[Tensor, " sample"]
    outside: Float[Tensor, " sample"]


def ood(
    model: nn.Module,
    inside_loader: Iterable[Mapping[str, Any]],
    outside_loader: Iterable[Mapping[str, Any]],
    *,
    score: str | Confidence = "gen",
) -> OOD:
    """Compares the confidence of a classifier on in-distribution and out-of-distribution samples.

    Args:
        model: a FusionModel for classification.
        inside_loader: in-distribution batches, dicts with every modality and targets.
        outside_loader: out-of-distribution batches; targets are ignored.
        score: "gen", "msp", "max_logit", "energy", or a function logits (sample, class) -> (sample,) that is higher for
            in-distribution samples, such as ``functools.partial(gen_score, top=100)``.

    Returns:
        OOD.

    Raises:
        ConfigError: an unknown score, or the model is not a classifier. ShapeError: an empty loader, or fewer than two
            classes. NonFiniteError: NaN or infinite logits.

    The result holds for *these* out-of-distribution samples only, and differences in recording conditions (another
    camera, another noise level) are detected as easily as differences in content.

    Reference: RollingQ (ICML 2025), Table 10, after MultiOOD (NeurIPS 2024).
    """
    if isinstance(score, str) and score not in CONFIDENCES:
        raise unknown_name("ood", "score", score, CONFIDENCES)
    task = getattr(model, "task", None)
    if task != "classification":
        raise ConfigError(
            "ood", expected="a model for classification", got=f"{type(model).__name__} with task = {task!r}"
        )
    confidence = CONFIDENCES[score] if isinstance(score, str) else score
    in_distribution, unknown = collect_predictions(model, inside_loader), collect_predictions(model, outside_loader)
    inside, outside = confidence(in_distribution.logits), confidence(unknown.logits)
    return OOD(
        score=score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__),
        accuracy=score_name(model, in_distribution.logits, in_distribution.target, "ood")
        if len(in_distribution.target)
        else math.nan,
        auroc=auroc(inside, outside),
        fpr95=fpr95(inside, outside),
        fpr95_id=fpr95(inside, outside, positive="id"),
        inside=inside,
        outside=outside,
    )
