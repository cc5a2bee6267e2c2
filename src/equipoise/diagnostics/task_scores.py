"""Scores of predictions by task, and the best constant prediction."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, NonFiniteError, ShapeError
from ..tokens.masks import at_least_float32

SCORES = {"classification": "accuracy", "multilabel": "accuracy", "regression": "negative_error"}
"""Task -> name of its score in results."""


def correct(
    logits: Float[Tensor, "*batch choice"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:  # fmt: skip
    """Accuracy of each sample, with ties of the largest logit broken at random in expectation.

    1 or 0 if one logit is largest, and 1 / n if n logits share the maximum and the target is among them; argmax would
    select the first, so a constant model would be correct on class 0. NaN if a logit is NaN.

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        tensor([1.0000, 0.5000])
    """
    best = logits == logits.amax(dim=-1, keepdim=True)
    choices = torch.arange(logits.shape[-1], device=logits.device)
    return (best & (choices == target[..., None])).any(dim=-1) / best.sum(dim=-1)


def task_score(logits: Tensor, target: Tensor, task: str) -> Tensor:
    """Mean score of predictions, higher is better; ``SCORES`` has its name.

    Classification: accuracy, see ``correct``. Multilabel: fraction of labels whose logit has the correct sign.
    Regression: negative mean absolute error.

    Example:
        >>> task_score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        tensor(0.5000)
    """
    return outcomes(logits, target, task).mean()


def outcomes(logits: Tensor, target: Tensor, task: str) -> Float[Tensor, " sample"]:
    """Score of each sample; ``task_score`` is the mean.

    1 or 0 for classification, the fraction of correct labels for multilabel, the negative mean absolute error over
    outputs for regression.

    Example:
        >>> outcomes(torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[1, 1], [1, 1]]), "multilabel")
        tensor([0.5000, 1.0000])
    """
    if task == "classification":
        return correct(logits, target)
    target = target.reshape(logits.shape)
    if task == "multilabel":
        return ((logits > 0) == target.bool()).float().flatten(1).mean(dim=1)
    return -(logits - target).abs().flatten(1).mean(dim=1)


def score_name(model: nn.Module, logits: Float[Tensor, "sample output"], target: Tensor, who: str) -> float:
    """Returns the score of the predictions of a model.

    Raises:
        ConfigError: the model has no ``task``. ShapeError: samples without targets. NonFiniteError: a prediction is NaN.
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


def constant_answer(target: Tensor, task: str) -> Float[Tensor, " output"]:
    """Returns the logits of the constant prediction with the best score on the given targets.

    Classification: the most frequent class. Multilabel: the more frequent value of each label. Regression: the median
    target, which minimizes the mean absolute error.

    Example:
        >>> constant_answer(torch.tensor([2, 0, 2, 1]), "classification")
        tensor([0., 0., 1.])
    """
    if task == "classification":
        return F.one_hot(target.long().mode().values, int(target.max()) + 1).float()
    known = at_least_float32(target)
    return (known.mean(dim=0) - 0.5 if task == "multilabel" else known.median(dim=0).values).reshape(-1)
