"""Shapley values of the modalities: contribution of each modality to the score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..fusion.subset_tokens import modality_subsets, shapley_values
from ..results.task_metrics import Metric, find_metric
from .modality_ablation import ablated_logits, record_fusion
from .task_scores import constant_logits, score_name

MOST = 8
"""Maximum number of modalities; each further one doubles the number of forward passes of the fusion."""


def modality_shapley(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], *, metric: str | Metric | None = None
) -> dict[str, float]:
    """Computes the Shapley value of each modality for the score::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    v(S) is the score of the model with only the modalities in S, the others masked as in ``mask_modality``. v of the
    empty set is the score of the best constant prediction: the most frequent class of the targets of the loader, the
    more frequent value of each label, or the median target, which minimizes the mean absolute error; 0 for a metric
    that is undefined for constant predictions.

    Args:
        model: a FusionModel with at most 8 modalities.
        loader: batches, dicts with every modality and targets. The encoders run once and the fusion 2^N - 1 times.
        metric: name of a metric of ``equipoise.results`` that replaces the score of the task.

    Returns:
        name -> value, in units of the score. The values sum to v of all modalities minus v of the empty set. Redundant
        modalities share their contribution. A negative value means that the modality reduces the score. The average
        includes subsets on which the model was not trained, so a modality may receive credit for errors that the model
        makes on the others alone.

    Raises:
        ConfigError: the model is not a FusionModel, or has more than 8 modalities. ShapeError: no batch, or no targets.
        NonFiniteError: a prediction is NaN.

    Reference: Wei et al., "Enhancing Multimodal Cooperation via Sample-level Modality Valuation" (CVPR 2024);
    BalanceBenchmark.
    Differs from the paper in: the score of the data set instead of single samples, and the constant prediction as the
    empty set.
    """
    names = record_fusion(model, "modality_shapley").names
    if len(names) > MOST:
        raise ConfigError("modality_shapley", expected=f"at most {MOST} modalities", got=f"{len(names)}")
    _, *subsets = modality_subsets(names)
    predictions = ablated_logits(model, loader, [[name for name in names if name not in subset] for subset in subsets])
    scores = [
        score_name(model, part, predictions.target, "modality_shapley", metric)
        for part in predictions.logits.unbind(dim=1)
    ]
    chosen = find_metric(metric, model.task, "modality_shapley")  # type: ignore[arg-type]
    constant = constant_logits(predictions.target, model.task, chosen, predictions.logits.shape[2])  # type: ignore[arg-type]
    empty = score_name(
        model, constant.expand(len(predictions.target), -1), predictions.target, "modality_shapley", metric
    )
    # A correlation with a constant is undefined; no information counts as 0.
    scores.insert(0, empty if metric is None or not math.isnan(empty) else 0.0)
    return dict(zip(names, shapley_values(torch.tensor(scores, dtype=torch.float64)).tolist(), strict=True))
