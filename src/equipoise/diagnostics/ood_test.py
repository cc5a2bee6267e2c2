"""Does a classifier notice what it has never been taught? (spec 8.7)"""

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
    """How well confidence tells known classes from unknown ones.

    Attributes:
        score: name of the confidence.
        accuracy: on the known classes alone; NaN where they came without targets.
        auroc: probability that a sample of a known class has more confidence than one of an unknown class.
        fpr95: part of the known that is rejected when 95 % of the unknown are (``positive="ood"``).
        fpr95_id: part of the unknown that is accepted when 95 % of the known are (``positive="id"``).
        inside, outside: (sample,) confidence of the known and of the unknown.
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
    """Shows a classifier samples of classes that it knows and of others, and compares its confidence.

    Args:
        model: a FusionModel for classification.
        inside_loader: batches, dicts with every modality, of known classes, with targets.
        outside_loader: batches of unknown classes; their targets are not read.
        score: "gen", "msp", "max_logit", "energy", or a function logits (sample, class) -> (sample,) that is higher for
            what is known, such as ``functools.partial(gen_score, top=100)``.

    Returns:
        OOD.

    Raises:
        ConfigError: an unknown score, a model that is no classifier. ShapeError: an empty loader, fewer than two
            classes. NonFiniteError: logits that are no numbers.

    A good figure says that confidence is lower on *these* unknown classes. It says nothing of others, and a difference
    of recording (another camera, another noise) is found as easily as a difference of content.

    Reference: RollingQ (ICML 2025), Table 10, after MultiOOD (NeurIPS 2024); spec 8.7.
    """
    if isinstance(score, str) and score not in CONFIDENCES:
        raise unknown_name("ood", "score", score, CONFIDENCES)
    task = getattr(model, "task", None)
    if task != "classification":
        raise ConfigError(
            "ood", expected="a model for classification", got=f"{type(model).__name__} with task = {task!r}"
        )
    confidence = CONFIDENCES[score] if isinstance(score, str) else score
    known, unknown = collect_predictions(model, inside_loader), collect_predictions(model, outside_loader)
    inside, outside = confidence(known.logits), confidence(unknown.logits)
    return OOD(
        score=score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__),
        accuracy=score_name(model, known.logits, known.target, "ood") if len(known.target) else math.nan,
        auroc=auroc(inside, outside),
        fpr95=fpr95(inside, outside),
        fpr95_id=fpr95(inside, outside, positive="id"),
        inside=inside,
        outside=outside,
    )
