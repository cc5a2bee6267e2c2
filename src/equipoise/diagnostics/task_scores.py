"""How good answers are, by the model's task, and how good one answer for everybody would be."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, NonFiniteError, ShapeError

SCORES = {"classification": "accuracy", "multilabel": "accuracy", "regression": "negative_error"}
"""Task -> what its score is called in results."""


def correct(
    logits: Float[Tensor, "*batch choice"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:  # fmt: skip
    """The probability that the target is chosen, where the largest logit is and equal ones are drawn from at random.

    1 or 0 where one logit is largest, and 1 / n where n share the maximum and the target is among them: argmax would
    choose the first of them, and a constant model would be right about class 0. NaN where a logit is NaN.

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        tensor([1.0000, 0.5000])
    """
    best = logits == logits.amax(dim=-1, keepdim=True)
    choices = torch.arange(logits.shape[-1], device=logits.device)
    return (best & (choices == target[..., None])).any(dim=-1) / best.sum(dim=-1)


def task_score(logits: Tensor, target: Tensor, task: str) -> Tensor:
    """How good answers are, higher is better, as a mean over samples; ``SCORES`` has its name.

    Classification: the share of correct answers, see ``correct``. Multilabel: the share of labels for which the logit
    has the right sign. Regression: minus the mean absolute error.

    Example:
        >>> score(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), "classification")
        tensor(0.5000)
    """
    return outcomes(logits, target, task).mean()


def outcomes(logits: Tensor, target: Tensor, task: str) -> Float[Tensor, " sample"]:
    """How good the answer to each sample is; ``score`` is the mean.

    1 or 0 for classes, the part of its labels that are right for multilabel, minus the mean absolute error of its
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
    """The score of a model's answers, as a number.

    Raises:
        ConfigError: a model that does not say its task. ShapeError: samples without targets. NonFiniteError: an answer
            that is NaN.
    """
    task = getattr(model, "task", None)
    if task not in SCORES:
        raise ConfigError(
            who,
            expected=f"a model whose task is {', '.join(SCORES)}",
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
    """Raises NonFiniteError where an answer is NaN: it would count as some class, and the score as a figure."""
    bad = logits.isnan().flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            who,
            expected="logits that are numbers",
            got=f"NaN for {len(bad)} of {len(logits)} samples, the first is number {bad[0]}",
            fix="Look for NaN in that sample's input, then in the model's weights.",
        )


def constant_answer(target: Tensor, task: str) -> Float[Tensor, " output"]:
    """The same logits for every sample, of a model that knows the targets and looks at no input.

    Classification: the most frequent class. Multilabel: each label's more frequent value. Regression: the median
    target, which has the least mean absolute error. No constant answer has a better score on these targets.

    Example:
        >>> constant_answer(torch.tensor([2, 0, 2, 1]), "classification")
        tensor([0., 0., 1.])
    """
    if task == "classification":
        return F.one_hot(target.long().mode().values, int(target.max()) + 1).float()
    known = target.to(torch.promote_types(target.dtype, torch.float32))
    return (known.mean(dim=0) - 0.5 if task == "multilabel" else known.median(dim=0).values).reshape(-1)
