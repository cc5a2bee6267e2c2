"""MMCosine: cosine logits, so that no modality dominates by the norm of its features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .balancer import Balancer, Multimodal
from .common.unimodal_terms import at_least_single, check_concatenated, check_modalities


def cosine_logits(
    features: Float[Tensor, "batch dim"], weight: Float[Tensor, "output dim"], *, scale: float
) -> Float[Tensor, "batch output"]:
    """Returns scale cos(f, W_c) for each output c; 0 if f is zero, as for a sample that lacks the modality.

    Example:
        >>> cosine_logits(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]]), scale=10.0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    features, weight = at_least_single(features), at_least_single(weight)
    return scale * F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1))


class MMCosine(Balancer):
    """Computes logits from the cosines between each modality's vector and its class vectors::

        y_c = s sum_m cos(f_m, W_{m,c}),  no bias, in training and at test time

    Args:
        model: with a fusion that concatenates pooled vectors (``Concat``, ``Sum``). Its ``head`` is replaced and saved
            in checkpoints: create the optimizer afterward.
        scale: s > 0.

    Raises:
        ConfigError: one modality, a scale out of range, a fusion of another kind.

    It helps if the norms of one modality's features or weights dominate. Logits are bounded by s N, and so is the
    confidence; the targets of a regression must be well within this bound.

    Reference: Xu, Feng, Zhang and Hu, "MMCosine: Multi-Modal Cosine Loss Toward Balanced Audio-Visual Fine-Grained
    Learning" (ICASSP 2023).
    Differs from the released code in: the scale is also applied at test time, and any number of modalities.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancer = eq.balance.MMCosine(model, scale=15.0)
        >>> logits = model({"audio": torch.randn(4, 7, 3), "image": torch.randn(4, 2, 5)}).logits
        >>> bool((logits.abs() <= 2 * 15.0).all())
        True
    """

    excludes: ClassVar[Mapping[str, str]] = {
        "MLA": "both replace the model's head",
        "ReconBoost": "both replace the model's head",
    }

    def __init__(self, model: Multimodal, *, scale: float = 15.0) -> None:
        super().__init__()
        check_modalities(model, "MMCosine")
        check_concatenated(model, "MMCosine")
        if not 0 < scale < math.inf:
            raise ConfigError("MMCosine", expected="scale > 0 and finite", got=f"scale = {scale}")
        like = next(model.head.parameters())
        head = CosineHead(len(model.names), model.fusion.dim, model.num_outputs, scale)
        model.head = head.to(like.device, like.dtype)


class CosineHead(nn.Module):
    """One class vector per modality and output; the scaled cosines are added over modalities.

    Args:
        num_modalities: number of concatenated vectors of width ``dim`` in the features.
        dim, num_outputs, scale: see ``MMCosine``.
    """

    def __init__(self, num_modalities: int, dim: int, num_outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_modalities, num_outputs, dim))
        # Only directions matter; those of normal vectors are uniform.
        nn.init.normal_(self.weight)

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Returns each modality's contribution to the logits."""
        parts = zip(features.chunk(len(self.weight), dim=-1), self.weight, strict=True)
        return [cosine_logits(part, weight, scale=self.scale) for part, weight in parts]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return torch.stack(self.pieces(features)).sum(dim=0)
