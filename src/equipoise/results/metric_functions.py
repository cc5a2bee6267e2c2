"""Functions of the metrics that are no mean over samples, computed in float64, most of them by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require_extra
from .sample_outcomes import correct


class UndefinedMetric(Exception):
    """Raised by a metric that has no value for the given samples, with the reason."""


def balanced_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over classes of the recall: (1 / C) sum_c mean of correct_i over the samples i of class c.

    Classes without samples are left out. Ties of the largest logit count as in ``accuracy``.
    """
    right = correct(logits, target).double()
    return torch.stack([right[target == label].mean() for label in target.unique()]).mean()


def f1_macro(predictions: Tensor, target: Tensor) -> Tensor:
    """Mean over classes or labels of F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c).

    A class that is neither predicted nor a target is left out; a label without any positive counts as 0.
    """
    with require_extra("f1_macro"):
        from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score
    if target.ndim > 1:
        # The threshold applies to scores; 0 and 1 are on either side of it.
        return multilabel_f1_score(predictions, target, num_labels=target.shape[1], average="none").double().mean()
    count = int(max(predictions.max(), target.max())) + 1
    each = multiclass_f1_score(predictions, target, num_classes=max(count, 2), average="none").double()
    present = torch.zeros(len(each), dtype=torch.bool)
    present[predictions] = present[target] = True
    return each[present].mean()


def one_vs_rest(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (sample, question) and answers (sample, question) of 0 or 1 for ranking metrics.

    One question for each label or class; for two classes, the second class alone.
    """
    if target.ndim > 1:
        return probabilities, target
    if probabilities.shape[1] == 2:
        return probabilities[:, 1:], target[:, None]
    return probabilities, torch.nn.functional.one_hot(target, probabilities.shape[1])


def auroc(probabilities: Tensor, target: Tensor) -> Tensor:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    Two classes: of the second. Several classes (one against the rest) and labels: the mean over those that have
    positives and negatives.
    """
    with require_extra("auroc"):
        from torchmetrics.functional.classification import binary_auroc
    scores, answers = one_vs_rest(probabilities, target)
    columns = [column for column in range(answers.shape[1]) if 0 < int(answers[:, column].sum()) < len(answers)]
    if not columns:
        raise UndefinedMetric(
            "all targets are of one class" if target.ndim == 1 else "no label has positives and negatives"
        )
    return torch.stack([binary_auroc(scores[:, column], answers[:, column]).double() for column in columns]).mean()


def average_precision(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over labels or classes of AP = sum_n (R_n - R_{n-1}) P_n over the thresholds n, from the highest score down.

    P_n and R_n are precision and recall of the samples at or above the threshold. Labels without positives are left
    out. Two classes: of the second.
    """
    with require_extra("map"):
        from torchmetrics.functional.classification import binary_average_precision
    scores, answers = one_vs_rest(probabilities, target)
    columns = [column for column in range(answers.shape[1]) if int(answers[:, column].sum())]
    if not columns:
        raise UndefinedMetric("no target is positive")
    values = [binary_average_precision(scores[:, column], answers[:, column]) for column in columns]
    return torch.stack(values).double().mean()


def rmse(values: Tensor, target: Tensor) -> Tensor:
    """sqrt(mean of (value - target)^2) over samples and outputs."""
    with require_extra("rmse"):
        from torchmetrics.functional.regression import mean_squared_error
    return mean_squared_error(values, target, squared=False)


def pearson(values: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation cov(x, y) / sqrt(var(x) var(y)) of predictions and targets; mean over outputs."""
    with require_extra("pearson"):
        from torchmetrics.functional.regression import pearson_corrcoef
    values, target = values.flatten(1), target.flatten(1)
    for name, part in (("predictions", values), ("targets", target)):
        if bool(is_constant(part).any()):
            raise UndefinedMetric(f"the {name} are constant")
    # Centered and scaled, so that the variance is not lost in the size of the values.
    x, y = (standardized(part) for part in (values, target))
    return torch.stack([pearson_corrcoef(a, b) for a, b in zip(x.unbind(1), y.unbind(1), strict=True)]).mean()


def concordance(values: Tensor, target: Tensor) -> Tensor:
    """Concordance correlation coefficient, mean over outputs::

        CCC = 2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y))^2)

    with moments over n samples (1 / n), as in Lin, "A concordance correlation coefficient to evaluate reproducibility"
    (Biometrics 1989). torchmetrics uses 1 / (n - 1), so its values differ in small samples. A constant prediction has
    CCC = 0.
    """
    x, y = values.flatten(1), target.flatten(1)
    if bool((is_constant(x) & is_constant(y) & ((x - y).abs().amax(dim=0) == 0)).any()):
        raise UndefinedMetric("predictions and targets are the same constant")
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    a, b = x - mean_x, y - mean_y
    shared = 2 * (a * b).mean(dim=0)
    return (shared / (a.square().mean(dim=0) + b.square().mean(dim=0) + (mean_x - mean_y).square())).mean()


def is_constant(values: Tensor) -> Tensor:
    """Whether each column has no spread but that of rounding."""
    middle = values.mean(dim=0)
    return (values - middle).abs().amax(dim=0) <= 1e-12 * values.abs().amax(dim=0).clamp(min=1e-300)


def standardized(values: Tensor) -> Tensor:
    """Columns with mean 0 and largest magnitude 1."""
    values = values - values.mean(dim=0)
    return values / values.abs().amax(dim=0).clamp(min=1e-300)


def sentiment_signs(values: Tensor, target: Tensor, *, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(predicted, true, scored) of each sample.

    With ``zeros``, the classes are negative and non-negative, and all samples are scored. Without, they are negative
    and positive, and samples with a target of 0 are not scored; a prediction of 0 counts as negative.
    """
    values, target = check_sentiment(values, target)
    if zeros:
        return values >= 0, target >= 0, torch.ones_like(target, dtype=torch.bool)
    if not bool((target != 0).any()):
        raise UndefinedMetric("all targets are 0")
    return values > 0, target > 0, target != 0


def sentiment_classes(values: Tensor, target: Tensor) -> Tensor:
    """-3, ..., 3: the nearest integer to each value, halves to the even one."""
    values, _ = check_sentiment(values, target)
    return values.clamp(-3, 3).round()


def check_sentiment(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(sample,) values and targets of one output in [-3, 3]."""
    values, target = values.flatten(1), target.flatten(1)
    if target.shape[1] != 1:
        raise UndefinedMetric(f"defined for one output, and there are {target.shape[1]}")
    if float(target.abs().max()) > 3:
        raise UndefinedMetric("defined for targets in [-3, 3], and some are outside")
    return values[:, 0], target[:, 0]


def f1_sentiment(values: Tensor, target: Tensor, *, zeros: bool) -> Tensor:
    """Mean of the F1 of both classes of ``sentiment_signs``, weighted by the number of targets of each."""
    with require_extra("f1_sentiment"):
        from torchmetrics.functional.classification import multiclass_f1_score
    predicted, actual, scored = sentiment_signs(values, target, zeros=zeros)
    predicted, actual = predicted[scored].long(), actual[scored].long()
    each = multiclass_f1_score(predicted, actual, num_classes=2, average="none").double()
    share = actual.double().mean()
    return each[0] * (1 - share) + each[1] * share
