"""Shapley values of the modalities: contribution of each modality to the score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..fusion.subset_tokens import modality_subsets, shapley_values
from .modality_ablation import ablated_logits, record_fusion
from .task_scores import constant_answer, score_name

MOST = 8
"""Maximum number of modalities; each further one doubles the number of forward passes of the fusion."""


def modality_shapley(model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Computes the Shapley value of each modality for the score::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    v(S) is the score of the model with only the modalities in S, the others masked as in ``mask_modality``. v of the
    empty set is the score of the best constant prediction: the most frequent class of the targets of the loader, the
    more frequent value of each label, or the median target, which minimizes the mean absolute error.

    Args:
        model: a FusionModel with at most 8 modalities.
        loader: batches, dicts with every modality and targets. The encoders run once and the fusion 2^N - 1 times.

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
    Differs from the paper in: the score of the data set instead of single samples, and the constant prediction as the empty set.
    """
    names = record_fusion(model, "modality_shapley").names
    if len(names) > MOST:
        raise ConfigError("modality_shapley", expected=f"at most {MOST} modalities", got=f"{len(names)}")
    _, *subsets = modality_subsets(names)
    seen = ablated_logits(model, loader, [[name for name in names if name not in subset] for subset in subsets])
    scores = [score_name(model, part, seen.target, "modality_shapley") for part in seen.logits.unbind(dim=1)]
    constant = constant_answer(seen.target, model.task).expand(len(seen.target), -1)  # type: ignore[arg-type]
    scores.insert(0, score_name(model, constant, seen.target, "modality_shapley"))
    return dict(zip(names, shapley_values(torch.tensor(scores, dtype=torch.float64)).tolist(), strict=True))
