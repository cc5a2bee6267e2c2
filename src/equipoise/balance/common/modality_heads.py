"""A linear head for each modality on its part of concatenated features."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..balancer import Multimodal
from .unimodal_terms import at_least_single, detach_unimodal_heads, split_concatenated


class ModalityHeads(nn.Module):
    """A linear head per modality, W_m f_m + b_m; base class of heads that combine their logits.

    Args:
        count: number of modalities.
        dim: width of one vector.
        num_outputs: number of classes, labels or targets.
    """

    def __init__(self, count: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, num_outputs) for _ in range(count))

    def modality_logits(self, index: int, vectors: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch output"]:
        """Returns the logits of one modality, in the precision of the weights, also under autocast.

        With a loss of several times a mean cross entropy, the gradient of a head in float16 would overflow at the
        initial scale of ``GradScaler``.
        """
        part = cast(nn.Linear, self.parts[index])
        with torch.autocast(vectors.device.type, enabled=False):
            return part(vectors.to(part.weight.dtype))

    def all_logits(
        self, features: Float[Tensor, "batch feature"]
    ) -> tuple[Float[Tensor, "batch modality output"], Bool[Tensor, "batch modality"]]:
        """Returns the logits of all modalities, zero for missing ones, and which modalities each sample has."""
        vectors, present = split_concatenated(features, len(self.parts))
        stacked = torch.stack([self.modality_logits(m, vectors[:, m]) for m in range(len(self.parts))], dim=1)
        return at_least_single(stacked).masked_fill(~present[..., None], 0.0), present


def replace_head(model: Multimodal, kind: type[ModalityHeads], *options: Any) -> None:
    """Replaces the head of a model that concatenates pooled vectors, and detaches its unimodal heads.

    Args:
        model: see ``check_concatenated``, which the caller calls first.
        kind: class of the head.
        options: further arguments of its constructor.
    """
    like = next(model.head.parameters())
    head = kind(len(model.names), model.fusion.dim, model.num_outputs, *options)
    model.head = head.to(like.device, like.dtype)
    detach_unimodal_heads(model)
