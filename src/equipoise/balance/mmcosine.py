"""MMCosine: logits of cosines, in which no modality wins by the length of its vectors."""

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
    """scale cos(f, W_c) for every output c; 0 where f is zero, as for a sample that lacks the modality.

    Example:
        >>> cosine_logits(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]]), scale=10.0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    features, weight = at_least_single(features), at_least_single(weight)
    return scale * F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1))


class MMCosine(Balancer):
    """Scores by the cosines between each modality's vector and its class vectors::

        y_c = s sum_m cos(f_m, W_{m,c}),  no bias, in training and at test time

    Args:
        model: of a fusion that puts pooled vectors side by side (``Concat``, ``Sum``). Its ``head`` is replaced, which
            a checkpoint holds: make the optimizer afterward.
        scale: s > 0.

    Raises:
        ConfigError: one modality, a scale out of range, a fusion of another kind.

    It helps where one modality's features or weights grow long and drown the others. Logits lie within s N of zero, so
    confidence has a bound, and a regression's targets must lie well within it.

    Reference: Xu, Feng, Zhang and Hu, "MMCosine: Multi-Modal Cosine Loss Toward Balanced Audio-Visual Fine-Grained
    Learning" (ICASSP 2023); spec 3.3.
    Differs from the released code in: the scale stays at test time, and any number of modalities.

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
        "MLA": "both put a head of their own in place of the model's",
        "ReconBoost": "both put a head of their own in place of the model's",
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
    """A class vector for each modality and output; the modalities' scaled cosines are added.

    Args:
        num_modalities: whose vectors of width ``dim`` stand side by side in the features.
        dim, num_outputs, scale: see ``MMCosine``.
    """

    def __init__(self, num_modalities: int, dim: int, num_outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_modalities, num_outputs, dim))
        # Directions alone count, and these are uniform.
        nn.init.normal_(self.weight)

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Each modality's part of the logits."""
        parts = zip(features.chunk(len(self.weight), dim=-1), self.weight, strict=True)
        return [cosine_logits(part, weight, scale=self.scale) for part, weight in parts]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return torch.stack(self.pieces(features)).sum(dim=0)
