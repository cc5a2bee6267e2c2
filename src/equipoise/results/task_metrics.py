"""Metrics of predictions by name, such as macro F1 or the concordance correlation coefficient."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, unknown_name
from . import weighted_metrics as weighted
from .metric_functions import (
    UndefinedMetric,
    auroc,
    average_precision,
    balanced_accuracy,
    concordance,
    f1_macro,
    f1_sentiment,
    pearson,
    rmse,
    sentiment_classes,
    sentiment_signs,
)
from .sample_outcomes import outcomes as task_outcomes

Needs = Literal["logits", "probabilities", "predictions"]
Function = Callable[[Tensor, Tensor], Any]
"""(predictions, targets) -> number."""
TASKS = ("classification", "multilabel", "regression")
RESERVED = ("noise", "mask", "alone", "with", "constant", "corrupted")
"""Last words of the names under which results hold a metric under a condition, as in ``accuracy_noise/audio``."""


class MetricValue(NamedTuple):
    """The value of a metric; NaN with the reason if it is undefined for the samples."""

    value: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of the predictions for a set of samples.

    Args:
        name: in recipes and results.
        title: name in sentences.
        function: (predictions, targets) -> number, with predictions as ``needs`` says.
        tasks: the tasks that the metric is defined for.
        needs: ``"logits"``: outputs of the model. ``"probabilities"``: their softmax (classification) or sigmoid
            (multilabel). ``"predictions"``: the class with the largest logit, (sample,), or the labels with positive
            logits as 0 and 1, (sample, label). The three are the same for regression: values of (sample, output).
        higher: whether larger values are better.
        percent: whether values are fractions that are displayed in percent.
        bounds: smallest and largest possible value.
        outcomes: (predictions, targets) -> (sample,); set if the metric is the mean of them, NaN marks a sample that is
            not scored.
        reweighted: (predictions, targets, weights of (resample, sample)) -> (resample,): the metric of samples that
            are repeated as often as their weight says; by default ``function`` is called for every resample.
        constant: targets -> outputs of the best constant prediction; by default the one of the task.
    """

    name: str
    title: str
    function: Function
    tasks: tuple[str, ...] = TASKS
    needs: Needs = "predictions"
    higher: bool = True
    percent: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    outcomes: Function | None = None
    reweighted: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    constant: Callable[[Tensor], Tensor] | None = None

    def prepare(self, logits: Tensor, target: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """(predictions, targets) as ``function`` takes them; regression and probabilities in float64."""
        if task == "regression":
            return logits.double().contiguous(), target.reshape(logits.shape).double().contiguous()
        target = target.long() if task == "classification" else target.reshape(logits.shape).long()
        if self.needs == "logits":
            return logits, target
        if task == "classification":
            return (logits.double().softmax(dim=1) if self.needs == "probabilities" else logits.argmax(dim=1)), target
        return (logits.double().sigmoid() if self.needs == "probabilities" else (logits > 0).long()), target

    def evaluate(self, logits: Tensor, target: Tensor, task: str) -> MetricValue:
        """The metric of outputs of a model.

        Args:
            logits: (sample, output).
            target: as in a batch: classes (sample,), labels (sample, label), or values.
            task: "classification", "multilabel" or "regression".

        Example:
            >>> logits, target = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
            >>> METRICS["balanced_accuracy"].evaluate(logits, target, "classification")
            MetricValue(value=0.5, reason='')
            >>> METRICS["auroc"].evaluate(logits, torch.tensor([0, 0]), "classification")
            MetricValue(value=nan, reason='all targets are of one class')
        """
        if not len(logits):
            return MetricValue(math.nan, "there are no samples")
        if not bool(logits.isfinite().all()):
            return MetricValue(math.nan, "a prediction is NaN or infinite")
        inputs = self.prepare(logits, target, task)
        try:
            value = self.outcomes(*inputs).double().nanmean() if self.outcomes else self.function(*inputs)
        except UndefinedMetric as undefined:
            return MetricValue(math.nan, str(undefined))
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"metric '{self.name}'", expected="a function that returns a number", got=type(value).__name__,
                fix="Return a float, or a tensor with one element.",
            ) from None  # fmt: skip
        return MetricValue(value) if math.isfinite(value) else MetricValue(math.nan, "the metric is NaN or infinite")

    def each(self, logits: Tensor, target: Tensor, task: str) -> Tensor | None:
        """(sample,) outcomes whose mean is the metric; None if it is no such mean, or is undefined."""
        if self.outcomes is None or not bool(logits.isfinite().all()):
            return None
        try:
            return self.outcomes(*self.prepare(logits, target, task))
        except UndefinedMetric:
            return None


def _any_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return task_outcomes(logits, target, "classification" if target.ndim == 1 else "multilabel")


def _absolute_error(values: Tensor, target: Tensor) -> Tensor:
    return (values - target).abs().flatten(1).mean(dim=1)


def _acc2(values: Tensor, target: Tensor) -> Tensor:
    predicted, actual, _ = sentiment_signs(values, target, zeros=True)
    return (predicted == actual).double()


def _acc2_nonzero(values: Tensor, target: Tensor) -> Tensor:
    predicted, actual, scored = sentiment_signs(values, target, zeros=False)
    return (predicted == actual).double().masked_fill(~scored, math.nan)


def _acc7(values: Tensor, target: Tensor) -> Tensor:
    return (sentiment_classes(values, target) == sentiment_classes(target, target)).double()


def _f1_zeros(values: Tensor, target: Tensor) -> Tensor:
    return f1_sentiment(values, target, zeros=True)


def _f1_nonzero(values: Tensor, target: Tensor) -> Tensor:
    return f1_sentiment(values, target, zeros=False)


def _mean(function: Function) -> Function:
    return lambda values, target: function(values, target).double().nanmean()


def _all_labels(target: Tensor) -> Tensor:
    """All labels positive where they are labels, else the most frequent class."""
    if target.ndim > 1:
        return torch.ones(target.shape[1:]).reshape(-1)
    return F.one_hot(target.long().mode().values, int(target.max()) + 1).float()


def _mean_target(target: Tensor) -> Tensor:
    return target.double().mean(dim=0).reshape(-1)


def _common_class(target: Tensor) -> Tensor:
    return target.double().clamp(-3, 3).round().reshape(len(target), -1).mode(dim=0).values


CLASSES = ("classification", "multilabel")
REAL: tuple[float, float] = (0.0, math.inf)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", _mean(_any_accuracy), CLASSES, "logits", percent=True, outcomes=_any_accuracy),
        Metric(
            "balanced_accuracy", "balanced accuracy", balanced_accuracy, ("classification",), "logits", percent=True,
            reweighted=weighted.balanced_accuracy,
        ),
        Metric(
            "f1_macro", "macro F1", f1_macro, CLASSES, "predictions", percent=True,
            reweighted=weighted.f1_macro, constant=_all_labels,
        ),
        Metric("auroc", "AUROC", auroc, CLASSES, "probabilities", reweighted=weighted.auroc),
        Metric(
            "map", "mean average precision", average_precision, CLASSES, "probabilities", percent=True,
            reweighted=weighted.average_precision,
        ),
        Metric(
            "mae", "mean absolute error", _mean(_absolute_error), ("regression",), higher=False, bounds=REAL,
            outcomes=_absolute_error,
        ),
        Metric(
            "rmse", "root mean squared error", rmse, ("regression",), higher=False, bounds=REAL,
            reweighted=weighted.rmse, constant=_mean_target,
        ),
        Metric(
            "pearson", "Pearson correlation", pearson, ("regression",), bounds=(-1.0, 1.0), reweighted=weighted.pearson
        ),
        Metric(
            "concordance", "concordance correlation", concordance, ("regression",), bounds=(-1.0, 1.0),
            reweighted=weighted.concordance,
        ),
        Metric("acc2", "two-class accuracy", _mean(_acc2), ("regression",), percent=True, outcomes=_acc2),
        Metric(
            "acc2_nonzero", "two-class accuracy without zeros", _mean(_acc2_nonzero), ("regression",), percent=True,
            outcomes=_acc2_nonzero,
        ),
        Metric(
            "acc7", "seven-class accuracy", _mean(_acc7), ("regression",), percent=True, outcomes=_acc7,
            constant=_common_class,
        ),
        Metric(
            "f1_sentiment", "two-class F1", _f1_zeros, ("regression",), percent=True,
            reweighted=weighted.f1_sentiment,
        ),
        Metric(
            "f1_sentiment_nonzero", "two-class F1 without zeros", _f1_nonzero, ("regression",), percent=True,
            reweighted=weighted.f1_sentiment_nonzero,
        ),
    )
}  # fmt: skip
"""Name -> metric, for recipes, ``eq.diagnose`` and ``equipoise diagnose``."""


def own_metric(name: str, function: Any) -> Metric:
    """The metric of a function of your own; larger values are better.

    The function gets probabilities of (sample, class) or (sample, label), or values of (sample, output), and targets.
    A metric of which smaller values are better returns its negative and is named ``negative_...``; pages then display
    it without the sign, as an error.

    Raises:
        ConfigError: not a function, or a name that is in use or that results could not hold.
    """
    if not callable(function):
        raise ConfigError(
            f"metric '{name}'", expected="a function of predictions and targets", got=type(function).__name__
        )
    valid = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)
    if not valid or name in METRICS or name.rpartition("_")[2] in RESERVED:
        raise ConfigError(
            f"metric {name!r}", expected="a new name of letters, digits and underscores",
            got="a name that is in use" if valid else "a name with other characters",
            fix=f"Names that are in use: {', '.join(METRICS)}; endings that are in use: {', '.join(RESERVED)}.",
        )  # fmt: skip
    title = name.removeprefix("negative_").replace("_", " ")
    return Metric(name, title, function, needs="probabilities", bounds=(-math.inf, math.inf))


def select_metrics(
    names: Sequence[str], task: str | None, who: str, own: Mapping[str, Function] | None = None
) -> list[Metric]:
    """The metrics of these names, then the functions of your own that are not among them.

    Args:
        names: of ``METRICS`` or ``own``.
        task: of the model; None accepts the metrics of every task.
        who: begins the message of an error.
        own: name -> function, see ``own_metric``.

    Raises:
        ConfigError: an unknown name, or a metric that is not defined for the task.

    Example:
        >>> [metric.title for metric in select_metrics(["f1_macro", "auroc"], "classification", "recipe")]
        ['macro F1', 'AUROC']
    """
    mine = {name: own_metric(name, function) for name, function in (own or {}).items()}
    metrics = []
    for name in dict.fromkeys([*names, *mine]):
        if name not in mine and name not in METRICS:
            raise unknown_name(who, "metric", str(name), [*METRICS, *mine])
        metric = mine.get(name) or METRICS[name]
        if task is not None and task not in metric.tasks:
            available = [other.name for other in METRICS.values() if task in other.tasks]
            raise ConfigError(who, expected=f"a metric for {task}: {', '.join(available)}", got=f"'{name}'")
        metrics.append(metric)
    return metrics


def find_metric(metric: str | Metric | None, task: str | None, who: str) -> Metric | None:
    """The metric of a name, checked against the task; None stands for the score of the task.

    Raises:
        ConfigError: an unknown name, or a metric that is not defined for the task.
    """
    if metric is None or isinstance(metric, str):
        return None if metric is None else select_metrics([metric], task, who)[0]
    if isinstance(metric, Metric) and (task is None or task in metric.tasks):
        return metric
    raise ConfigError(
        who, expected=f"the name of a metric{f' for {task}' if task else ''}",
        got=f"'{metric.name}'" if isinstance(metric, Metric) else type(metric).__name__,
        fix="Functions of your own go into metrics={'name': function}." if callable(metric) else "",
    )  # fmt: skip
