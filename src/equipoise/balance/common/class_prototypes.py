"""Prototypes: the mean feature of each class, and how close samples are to them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .unimodal_scores import summed


def prototype_log_probabilities(
    features: Float[Tensor, "modality batch dim"],
    prototypes: Float[Tensor, "modality question class dim"],
    seen: Bool[Tensor, "modality question class"],
) -> Float[Tensor, "modality batch question class"]:
    """log softmax over classes of minus the Euclidean distance to each class's prototype; unseen classes get nothing.

    Where a feature lies on its prototype, the gradient of the distance is taken as 0.

    Example:
        >>> features, prototypes = torch.tensor([[[0.0]]]), torch.tensor([[[[3.0], [-3.0]]]])
        >>> prototype_log_probabilities(features, prototypes, torch.tensor([[[True, True]]])).exp()
        tensor([[[[0.5000, 0.5000]]]])
    """
    distances = torch.cdist(features, prototypes.flatten(1, 2), compute_mode="donot_use_mm_for_euclid_dist")
    logits = (-distances).unflatten(-1, prototypes.shape[1:3])
    # Finite, so that an entropy is too.
    return logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min / 4).log_softmax(dim=-1)


def class_means(
    features: Float[Tensor, "modality batch dim"],
    here: Bool[Tensor, "modality batch"],
    classes: Int[Tensor, "batch question"],
    count: int,
) -> tuple[Float[Tensor, "modality question class dim"], Bool[Tensor, "modality question class"]]:
    """Mean feature of each class over the samples, of all processes, that have the modality; and which classes had any.

    Args:
        features: of each modality.
        here: who has it.
        classes: of each sample, under each question.
        count: of classes.
    """
    member = F.one_hot(classes, count).to(features)[None] * here[..., None, None]
    sums, sizes = summed(torch.einsum("mbqc,mbd->mqcd", member, features)), summed(member.sum(dim=1))
    return sums / sizes.clamp(min=1)[..., None], sizes > 0
