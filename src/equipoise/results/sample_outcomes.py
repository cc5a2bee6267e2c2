"""Outcomes of single samples: 1 or 0 for a class, the fraction of correct labels, or the negative error."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
