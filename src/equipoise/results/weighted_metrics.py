"""Metrics of many resamples at once; the weight of a sample is the number of its repetitions in the resample.

Every function takes predictions and targets like its namesake in ``metric_functions``, and weights of (resample,
sample), float64; it returns (resample,), NaN where the metric is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .metric_functions import UndefinedMetric, one_vs_rest, sentiment_signs
from .sample_outcomes import correct


def mean(outcomes: Tensor, weights: Tensor) -> Tensor:
    """Mean of outcomes; NaN marks a sample that is not scored."""
    valid = ~outcomes.isnan()
    return weights @ outcomes.double().nan_to_num(0.0) / (weights @ valid.double())


def balanced_accuracy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    member = F.one_hot(target).double()
    recall = weights @ (member * correct(logits, target).double()[:, None]) / (weights @ member)
    return recall.nanmean(dim=1)


def f1_macro(predictions: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    several = target.ndim > 1
    count = int(max(predictions.max(), target.max())) + 1
    predicted, actual = (
        part.double() if several else F.one_hot(part, count).double() for part in (predictions, target)
    )
    each = 2 * weights @ (predicted * actual) / (weights @ predicted + weights @ actual)
    return each.nan_to_num(0.0).mean(dim=1) if several else each.nanmean(dim=1)


def auroc(probabilities: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    scores, answers = one_vs_rest(probabilities, target)
    values = []
    for score, answer in zip(scores.unbind(1), answers.double().unbind(1), strict=True):
        positive, total = _cumulative(score, answer, weights, descending=False)
        gained = positive.diff(dim=1, prepend=positive.new_zeros(len(positive), 1))
        below = total - positive
        before = F.pad(below[:, :-1], (1, 0))
        wins = (gained * (before + below) / 2).sum(dim=1)
        values.append(wins / (positive[:, -1] * below[:, -1]))
    return torch.stack(values, dim=1).nanmean(dim=1)


def average_precision(probabilities: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    scores, answers = one_vs_rest(probabilities, target)
    values = []
    for score, answer in zip(scores.unbind(1), answers.double().unbind(1), strict=True):
        positive, total = _cumulative(score, answer, weights, descending=True)
        gained = positive.diff(dim=1, prepend=positive.new_zeros(len(positive), 1))
        precision = positive / total.clamp(min=1)
        values.append((gained * precision).sum(dim=1) / positive[:, -1])
    return torch.stack(values, dim=1).nanmean(dim=1)


def _cumulative(score: Tensor, answer: Tensor, weights: Tensor, *, descending: bool) -> tuple[Tensor, Tensor]:
    """(resample, threshold): weight of the positives, and of all samples, up to each distinct score."""
    order = score.argsort(descending=descending)
    ordered = score[order]
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])
    weights = weights[:, order]
    return (weights * answer[order]).cumsum(dim=1)[:, last], weights.cumsum(dim=1)[:, last]


def rmse(values: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return mean((values - target).square().flatten(1).mean(dim=1), weights).sqrt()


def pearson(values: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    _, shared, first, second = _moments(values, target, weights)
    return (shared / (first * second).sqrt()).mean(dim=1)


def concordance(values: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    gap, shared, first, second = _moments(values, target, weights)
    return (2 * shared / (first + second + gap.square())).mean(dim=1)


def _moments(values: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(resample, output): difference of the means, covariance, and both variances; no variance where it is rounding."""
    x, y = values.flatten(1), target.flatten(1)
    gap, x, y = x.mean(dim=0) - y.mean(dim=0), x - x.mean(dim=0), y - y.mean(dim=0)
    total = weights.sum(dim=1, keepdim=True)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    shared = weights @ (x * y) / total - mean_x * mean_y
    spread = []
    for part, middle in ((x, mean_x), (y, mean_y)):
        variance = weights @ part.square() / total - middle.square()
        least = 1e-14 * part.abs().amax(dim=0).square()
        spread.append(torch.where(variance <= least, torch.zeros_like(variance), variance))
    return gap + mean_x - mean_y, shared, spread[0], spread[1]


def f1_sentiment(values: Tensor, target: Tensor, weights: Tensor, *, zeros: bool = True) -> Tensor:
    try:
        predicted, actual, scored = sentiment_signs(values, target, zeros=zeros)
    except UndefinedMetric:
        return weights.new_full((len(weights),), torch.nan)
    weights = weights * scored.double()
    predicted, actual = (F.one_hot(part.long(), 2).double() for part in (predicted, actual))
    support = weights @ actual
    each = 2 * weights @ (predicted * actual) / (weights @ predicted + support)
    return (each.nan_to_num(0.0) * support).sum(dim=1) / support.sum(dim=1)


def f1_sentiment_nonzero(values: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return f1_sentiment(values, target, weights, zeros=False)
