"""Targets of every task as classes, for methods that compare samples of one class."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..balancer import Multimodal
from .unimodal_scores import summed


def category_counts(model: Multimodal, bins: int) -> tuple[int, int]:
    """How many questions a target answers, and with how many classes each.

    Classification is one question with a class for each output; multilabel a question with two classes for each label;
    regression a question with ``bins`` classes for each output.
    """
    if model.task == "classification":
        return 1, model.num_outputs
    return model.num_outputs, 2 if model.task == "multilabel" else bins


def categories(target: Tensor, task: str, edges: Float[Tensor, "question edge"]) -> Int[Tensor, "batch question"]:
    """The class of every sample under every question.

    Args:
        target: as ``FusionModel.loss`` takes it.
        task: of the model.
        edges: of regression's bins, see ``bin_edges``; not read by the other tasks.

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
    """Edges between bins that hold equally many samples of a normal distribution with the targets' mean and variance.

    Mean and variance are those of all processes, which is why these are not the targets' own quantiles.

    Example:
        >>> bin_edges(torch.tensor([1.0, 3.0]), 4)  # mean 2, standard deviation 1
        tensor([[1.3255, 2.0000, 2.6745]], dtype=torch.float64)
    """
    target = target.reshape(len(target), -1).double()
    totals = summed(torch.stack([torch.ones_like(target), target, target.square()]).sum(dim=1))
    mean = totals[1] / totals[0].clamp(min=1)
    deviation = (totals[2] / totals[0].clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    quantiles = torch.special.ndtri(torch.arange(1, bins, dtype=torch.float64, device=target.device) / bins)
    return mean[:, None] + deviation[:, None] * quantiles
