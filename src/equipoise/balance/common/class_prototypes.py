"""Class prototypes: mean features of classes, and log probabilities from distances to them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...nn.distributed import all_reduce_sum


def prototype_log_probabilities(
    features: Float[Tensor, "modality batch dim"],
    prototypes: Float[Tensor, "modality question class dim"],
    has_prototype: Bool[Tensor, "modality question class"],
) -> Float[Tensor, "modality batch question class"]:
    """Returns the log softmax over classes of the negative Euclidean distances to the class prototypes.

    Classes without a prototype get probability 0. The gradient of a distance of 0 is taken as 0.

    Example:
        >>> features, prototypes = torch.tensor([[[0.0]]]), torch.tensor([[[[3.0], [-3.0]]]])
        >>> prototype_log_probabilities(features, prototypes, torch.tensor([[[True, True]]])).exp()
        tensor([[[[0.5000, 0.5000]]]])
    """
    distances = torch.cdist(features, prototypes.flatten(1, 2), compute_mode="donot_use_mm_for_euclid_dist")
    logits = (-distances).unflatten(-1, prototypes.shape[1:3])
    # Use a finite value, so that the entropy is finite.
    return logits.masked_fill(~has_prototype[:, None], torch.finfo(logits.dtype).min / 4).log_softmax(dim=-1)


def class_means(
    features: Float[Tensor, "modality batch dim"],
    present: Bool[Tensor, "modality batch"],
    classes: Int[Tensor, "batch question"],
    count: int,
) -> tuple[Float[Tensor, "modality question class dim"], Bool[Tensor, "modality question class"]]:
    """Returns the mean feature of each class over all processes, and which classes have samples.

    Args:
        features: features of each modality.
        present: which samples have the modality; other samples are ignored.
        classes: class of each sample, for each question.
        count: number of classes.
    """
    member = F.one_hot(classes, count).to(features)[None] * present[..., None, None]
    features = features.masked_fill(~present[..., None], 0.0)
    sums, sizes = all_reduce_sum(torch.einsum("mbqc,mbd->mqcd", member, features)), all_reduce_sum(member.sum(dim=1))
    return sums / sizes.clamp(min=1)[..., None], sizes > 0
