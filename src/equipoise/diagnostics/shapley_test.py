"""How much of the score each modality deserves: Shapley values over all sets of modalities (spec 8.10)."""

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
"""Modalities; every one more doubles the number of answers."""


def modality_shapley(model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What each modality adds to the score, as a mean over all orders in which modalities may come::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    v(S) is the score of the model with the modalities of S alone, the others masked as ``mask_modality`` masks them.
    v of nothing is the score of the best constant answer: the most frequent class of the loader's own targets, each
    label's more frequent value, or the median target, which has the least mean absolute error.

    Args:
        model: a FusionModel of at most 8 modalities.
        loader: batches, dicts with every modality and targets. The encoders run once and the fusion 2^N - 1 times.

    Returns:
        name -> value, in units of the score. The values add up to v of everything minus v of nothing. Modalities that
        say the same share what it is worth. A negative value means that the model would be better without: attention is
        spent on what misleads it. Sets that the model has not been trained on are in the mean too, so a modality may
        get credit for what others, alone, make wrong.

    Raises:
        ConfigError: a model that is no FusionModel, more than 8 modalities. ShapeError: no batch, no targets.
        NonFiniteError: answers that are NaN.

    Reference: Wei et al., "Enhancing Multimodal Cooperation via Sample-level Modality Valuation" (CVPR 2024);
    BalanceBenchmark; spec 8.10.
    Differs from the paper in: the score of the whole set, not of each sample, and a fair value of nothing.
    """
    names = record_fusion(model, "modality_shapley").names
    if len(names) > MOST:
        raise ConfigError("modality_shapley", expected=f"at most {MOST} modalities", got=f"{len(names)}")
    _, *sets = modality_subsets(names)
    seen = ablated_logits(model, loader, [[name for name in names if name not in some] for some in sets])
    scores = [score_name(model, part, seen.target, "modality_shapley") for part in seen.logits.unbind(dim=1)]
    constant = constant_answer(seen.target, model.task).expand(len(seen.target), -1)  # type: ignore[arg-type]
    scores.insert(0, score_name(model, constant, seen.target, "modality_shapley"))
    return dict(zip(names, shapley_values(torch.tensor(scores, dtype=torch.float64)).tolist(), strict=True))
