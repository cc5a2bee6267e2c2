"""How the keys of each modality lie to the query: angle and length, before and after noise (spec 8.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ConfigError
from .prediction_collection import CollectedPredictions

EDGES = np.linspace(-1.0, 1.0, 41)
"""Bins of the cosine histograms."""


def key_distribution(reading: CollectedPredictions) -> dict[str, dict[str, Any]]:
    """name -> histogram of cos(q, mean key), and mean and deviation of cosine and key length; JSON-able.

    Values of all samples and heads count alike; samples that lack the modality do not count.

    Raises:
        ConfigError: a reading of a model without attention.

    Reference: RollingQ (ICML 2025), Figures 1d and 5; spec 8.2.
    """
    if reading.cosine is None or reading.key_norm is None:
        raise ConfigError("key_distribution", expected="a model with attention over its modalities", got="none")
    found = {}
    for index, name in enumerate(reading.names):
        cosine = reading.cosine[..., index].flatten().numpy()
        length = reading.key_norm[..., index].flatten().numpy()
        # Rounding may take a cosine beyond 1, and the histogram would lose it.
        cosine, length = cosine[~np.isnan(cosine)].clip(-1.0, 1.0), length[~np.isnan(length)]
        counts, edges = np.histogram(cosine, EDGES)
        found[name] = {
            "cosine": {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()},
            "cosine_mean": _mean(cosine),
            "cosine_std": _std(cosine),
            "norm_mean": _mean(length),
            "norm_std": _std(length),
        }
    return found


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _std(values: np.ndarray) -> float | None:
    return float(values.std()) if len(values) else None
