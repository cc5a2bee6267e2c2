"""Bootstrap over samples: intervals of metrics, and the values of resamples for paired comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .significance import SURE
from .task_metrics import Metric
from .weighted_metrics import mean

COUNT = 999
"""Resamples; a p-value is a multiple of 1 / 1000."""
SEED = 0
"""All models meet the same resamples, so that they can be compared sample by sample."""


def resample_weights(samples: int, count: int = COUNT, seed: int = SEED) -> Iterator[Tensor]:
    """Batches of (resample, sample): how often each sample is in each resample of the same size.

    Example:
        >>> weights = torch.cat(list(resample_weights(5, count=3)))
        >>> weights.shape, weights.sum(dim=1).tolist()
        (torch.Size([3, 5]), [5.0, 5.0, 5.0])
    """
    draws, batch = np.random.default_rng(seed), max(1, 2_000_000 // max(samples, 1))
    for start in range(0, count, batch):
        size = min(batch, count - start)
        rows = draws.integers(samples, size=(size, samples)) + samples * np.arange(size)[:, None]
        counts = np.bincount(rows.reshape(-1), minlength=size * samples).reshape(size, samples)
        yield torch.from_numpy(counts.astype(np.float64))


def resampled_values(
    metric: Metric, logits: Tensor, target: Tensor, task: str, *, count: int = COUNT, seed: int = SEED
) -> np.ndarray:
    """The metric of each resample; NaN where it is undefined.

    Args:
        metric: see ``METRICS``.
        logits, target, task: as for ``Metric.evaluate``.
        count: number of resamples.
        seed: of the resamples, which depend on it and the number of samples alone.
    """
    if not bool(logits.isfinite().all()):
        return np.full(count, np.nan)
    each = metric.each(logits, target, task)
    inputs = metric.prepare(logits, target, task)
    parts = []
    for weights in resample_weights(len(logits), count, seed):
        if each is not None:
            parts.append(mean(each, weights))
        elif metric.outcomes is not None:
            parts.append(weights.new_full((len(weights),), torch.nan))
        elif metric.reweighted is not None:
            parts.append(metric.reweighted(*inputs, weights))
        else:
            parts.append(_repeated(metric, logits, target, task, weights))
    return torch.cat(parts).numpy()


def _repeated(metric: Metric, logits: Tensor, target: Tensor, task: str, weights: Tensor) -> Tensor:
    """A metric that has no form with weights, called for every resample."""
    values = []
    with warnings.catch_warnings():
        # A resample may lack a class, of which the function warns.
        warnings.simplefilter("ignore")
        for row in weights:
            chosen = torch.arange(len(logits)).repeat_interleave(row.long())
            try:
                values.append(metric.evaluate(logits[chosen], target[chosen], task).value)
            except (ArithmeticError, ValueError, IndexError, RuntimeError):
                values.append(torch.nan)
    return torch.tensor(values, dtype=torch.float64)


def mean_of_resamples(outcomes: np.ndarray) -> np.ndarray:
    """The mean of per-sample outcomes in each resample; NaN marks a sample that is not scored."""
    each = torch.from_numpy(np.asarray(outcomes, dtype=float))
    return torch.cat([mean(each, weights) for weights in resample_weights(len(each))]).numpy()


def percentile_interval(values: np.ndarray) -> list[float] | None:
    """[low, high], the 2.5th and 97.5th percentile of the resamples; None if fewer than half of them are defined.

    Example:
        >>> percentile_interval(np.arange(101.0)), percentile_interval(np.array([np.nan, np.nan, 1.0]))
        ([2.5, 97.5], None)
    """
    finite = values[np.isfinite(values)]
    if 2 * len(finite) < len(values) or not len(finite):
        return None
    return [float(end) for end in np.percentile(finite, [50 * SURE, 100 - 50 * SURE])]


def settings(samples: int) -> dict[str, Any]:
    """Settings that determine the resamples, as stored in results."""
    return {"samples": samples, "resamples": COUNT, "seed": SEED, "level": 1 - SURE}
