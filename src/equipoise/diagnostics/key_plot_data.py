"""Distribution of the cosines and norms of the mean keys of each modality."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ConfigError
from .prediction_collection import CollectedPredictions

EDGES = np.linspace(-1.0, 1.0, 41)
"""Bins of the cosine histograms."""


def key_distribution(predictions: CollectedPredictions) -> dict[str, dict[str, Any]]:
    """Returns name -> histogram of cos(q, mean key), and mean and standard deviation of cosine and key norm; JSON-able.

    All samples and heads have the same weight; samples without the modality are excluded.

    Raises:
        ConfigError: the model has no attention.

    Reference: RollingQ (ICML 2025), Figures 1d and 5.
    """
    if predictions.cosine is None or predictions.key_norm is None:
        raise ConfigError("key_distribution", expected="a model with attention over its modalities", got="none")
    distribution = {}
    for index, name in enumerate(predictions.names):
        cosine = predictions.cosine[..., index].flatten().numpy()
        length = predictions.key_norm[..., index].flatten().numpy()
        # Clip to [-1, 1], since rounding may move a cosine outside the bins.
        cosine, length = cosine[~np.isnan(cosine)].clip(-1.0, 1.0), length[~np.isnan(length)]
        counts, edges = np.histogram(cosine, EDGES)
        distribution[name] = {
            "cosine": {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()},
            "cosine_mean": _mean(cosine),
            "cosine_std": _std(cosine),
            "norm_mean": _mean(length),
            "norm_std": _std(length),
        }
    return distribution


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _std(values: np.ndarray) -> float | None:
    return float(values.std()) if len(values) else None
