"""How much of the score each modality deserves: Shapley values over all sets of modalities (spec 8.10)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from ..errors import ConfigError
from .ablation import answers, fused
from .scores import constant_answer, score_of

MOST = 8
"""Modalities; every one more doubles the number of answers."""


def modality_shapley(model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What each modality adds to the score, as a mean over all orders in which modalities may come::

        phi_m = sum_{S without m} |S|! (N - |S| - 1)! / N! (v(S + m) - v(S))

    v(S) is the score of the model with the modalities of S alone, the others masked as ``mask_modality`` masks them.
    v of nothing is the score of the best constant answer: the most frequent class of the loader's own targets, each
    label's more frequent value, or the mean target, which is best by its squared error.

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
    names = fused(model, "modality_shapley").names
    if len(names) > MOST:
        raise ConfigError("modality_shapley", expected=f"at most {MOST} modalities", got=f"{len(names)}")
    sets = [frozenset(some) for size in range(1, len(names) + 1) for some in combinations(names, size)]
    seen = answers(model, loader, [frozenset(names) - some for some in sets])
    worth = {
        some: score_of(model, logits, seen.target, "modality_shapley")
        for some, logits in zip(sets, seen.logits.unbind(dim=1), strict=True)
    }
    constant = constant_answer(seen.target, model.task)  # type: ignore[arg-type]
    worth[frozenset()] = score_of(model, constant.expand(len(seen.target), -1), seen.target, "modality_shapley")
    return shapley_values(names, worth)


def shapley_values(names: Sequence[str], worth: Mapping[frozenset[str], float]) -> dict[str, float]:
    """The formula of ``modality_shapley``, out of v of every set.

    Example:
        >>> some = [frozenset(), frozenset("a"), frozenset("b"), frozenset("ab")]
        >>> shapley_values("ab", dict(zip(some, [1.0, 3.0, 4.0, 10.0])))
        {'a': 4.0, 'b': 5.0}
    """
    count = len(names)
    return {
        name: math.fsum(
            (value - worth[some - {name}]) / (count * math.comb(count - 1, len(some) - 1))
            for some, value in worth.items()
            if name in some
        )
        for name in names
    }
