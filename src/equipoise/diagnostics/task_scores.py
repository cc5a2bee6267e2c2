"""Scores of predictions by task, and the best constant prediction."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, NonFiniteError, ShapeError
from ..results.sample_outcomes import correct as correct
from ..results.sample_outcomes import outcomes as outcomes
from ..results.task_metrics import Metric, find_metric
from ..tokens.masks import at_least_float32

SCORES = {"classification": "accuracy", "multilabel": "accuracy", "regression": "negative_error"}
"""Task -> name of its score in results."""


def task_score(logits: Tensor, target: Tensor, task: str) -> Tensor:
    """Mean score of predictions, higher is better; ``SCORES`` has its name.

    Classification: accuracy, see ``correct``. Multilabel: fraction of labels whose logit has the correct sign.
    Regression: negative mean absolute error.

    Example:
        >>> import torch
        >>> task_score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        tensor(0.5000)
    """
    return outcomes(logits, target, task).mean()


def score_name(
    model: nn.Module,
    logits: Float[Tensor, "sample output"],
    target: Tensor,
    who: str,
    metric: str | Metric | None = None,
) -> float:
    """Returns the score of the predictions of a model, or another metric; NaN where that is undefined.

    Raises:
        ConfigError: the model has no ``task``, or the metric is not defined for it. ShapeError: samples without
            targets. NonFiniteError: a prediction is NaN.
    """
    task = getattr(model, "task", None)
    if task not in SCORES:
        raise ConfigError(
            who,
            expected=f"a model with task = {', '.join(SCORES)}",
            got=f"{type(model).__name__} with task = {task!r}",
            fix="Set model.task, as FusionModel(..., task=...) does.",
        )
    if len(target) != len(logits):
        raise ShapeError(
            who,
            expected=f"a target for each of {len(logits)} samples",
            got=f"{len(target)}",
            fix="Give every batch a 'target'.",
        )
    check_answers(logits, who)
    chosen = find_metric(metric, task, who)
    if chosen is not None:
        return chosen.evaluate(logits, target, task).value
    return float(task_score(logits, target, task))


def check_answers(logits: Float[Tensor, "sample ..."], who: str) -> None:
    """Raises NonFiniteError if a prediction is NaN, since argmax would return some class for it."""
    bad = logits.isnan().flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            who,
            expected="logits without NaN",
            got=f"NaN for {len(bad)} of {len(logits)} samples, the first is number {bad[0]}",
            fix="Check the input of that sample and the weights of the model for NaN.",
        )


def constant_logits(target: Tensor, task: str, metric: Metric | None, outputs: int) -> Float[Tensor, " output"]:
    """Returns the outputs of the best constant prediction by a metric, or by the score of the task for None.

    For a metric, a classifier has as many ``outputs`` as the model, also for classes without targets.
    """
    if metric is None:
        return constant_answer(target, task)
    constant = constant_answer(target, task) if metric.constant is None else metric.constant(target)
    missing = outputs - len(constant) if task == "classification" else 0
    return F.pad(constant, (0, missing)) if missing > 0 else constant


def constant_answer(target: Tensor, task: str) -> Float[Tensor, " output"]:
    """Returns the logits of the constant prediction with the best score on the given targets.

    Classification: the most frequent class. Multilabel: the more frequent value of each label. Regression: the median
    target, which minimizes the mean absolute error.

    Example:
        >>> import torch
        >>> constant_answer(torch.tensor([2, 0, 2, 1]), "classification")
        tensor([0., 0., 1.])
    """
    if task == "classification":
        return F.one_hot(target.long().mode().values, int(target.max()) + 1).float()
    values = at_least_float32(target)
    return (values.mean(dim=0) - 0.5 if task == "multilabel" else values.median(dim=0).values).reshape(-1)
