"""Converts the targets of every task to classes, for methods that compare samples of one class."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...nn.distributed import all_reduce_sum
from ..balancer import Multimodal


def category_counts(model: Multimodal, bins: int) -> tuple[int, int]:
    """Returns the number of questions in a target, and the number of classes of each.

    Classification is one question with a class for each output; multilabel a question with two classes for each label;
    regression a question with ``bins`` classes for each output.
    """
    if model.task == "classification":
        return 1, model.num_outputs
    return model.num_outputs, 2 if model.task == "multilabel" else bins


def categories(target: Tensor, task: str, edges: Float[Tensor, "question edge"]) -> Int[Tensor, "batch question"]:
    """Returns the class of each sample for each question.

    Args:
        target: targets, in the form that ``FusionModel.loss`` takes.
        task: task of the model.
        edges: bin edges of a regression, see ``bin_edges``; ignored for the other tasks.

    Example:
        >>> categories(torch.tensor([-3.0, 0.1, 7.0]), "regression", torch.tensor([[-1.0, 1.0]])).T
        tensor([[0, 1, 2]])
    """
    if task == "classification":
        return target.long()[:, None]
    target = target.reshape(len(target), -1)
    if task == "multilabel":
        return (target > 0.5).long()
    return (target[:, :, None] > edges.to(target)).sum(dim=-1)


def bin_edges(target: Tensor, bins: int) -> Float[Tensor, "question edge"]:
    """Returns edges of bins with equal probability under a normal distribution with the targets' mean and variance.

    Mean and variance are computed over all processes, which quantiles of the targets would not allow.

    Example:
        >>> bin_edges(torch.tensor([1.0, 3.0]), 4)  # mean 2, standard deviation 1
        tensor([[1.3255, 2.0000, 2.6745]], dtype=torch.float64)
    """
    target = target.reshape(len(target), -1).double()
    totals = all_reduce_sum(torch.stack([torch.ones_like(target), target, target.square()]).sum(dim=1))
    mean = totals[1] / totals[0].clamp(min=1)
    deviation = (totals[2] / totals[0].clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    quantiles = torch.special.ndtri(torch.arange(1, bins, dtype=torch.float64, device=target.device) / bins)
    return mean[:, None] + deviation[:, None] * quantiles
