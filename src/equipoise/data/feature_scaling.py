"""Standardization of feature vectors and sequences with the statistics of the training split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureScaling:
    """Mean and standard deviation of each feature, over all samples and, for sequences, all valid steps.

    Attributes:
        mean, std: (feature,); ``std`` is 1 for a feature that is constant.

    Example:
        >>> scaling = FeatureScaling.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> scaling(torch.tensor([[4.0, 6.0]]))
        tensor([[2., 1.]])
    """

    mean: Float[Tensor, " feature"]
    std: Float[Tensor, " feature"]

    @classmethod
    def fit(
        cls, values: Float[Tensor, "sample ... feature"], mask: Bool[Tensor, "sample ..."] | None = None
    ) -> FeatureScaling:
        """Computes the statistics of the training split; values under a mask are excluded."""
        valid = (values.flatten(0, -2) if mask is None else values[mask]).double()
        std = valid.std(dim=0, correction=0)
        # Rounding makes the deviation of a constant feature slightly larger than 0.
        constant = std <= 1e-9 * valid.abs().amax(dim=0).clamp(min=1e-9)
        return cls(valid.mean(dim=0), torch.where(constant, 1.0, std))

    def __call__(
        self, values: Float[Tensor, "sample ... feature"], mask: Bool[Tensor, "sample ..."] | None = None
    ) -> Float[Tensor, "sample ... feature"]:
        """Standardizes values, in single precision; values under the mask become 0."""
        scaled = ((values.double() - self.mean) / self.std).float()
        return scaled if mask is None else scaled.masked_fill(~mask[..., None], 0.0)


def valid_statistics(values: Tensor, mask: Bool[Tensor, "sample ..."] | None = None) -> tuple[float, float]:
    """Returns (mean, standard deviation) over all valid values, for the noise that replaces a modality.

    Example:
        >>> valid_statistics(torch.tensor([[[1.0], [3.0], [0.0]]]), torch.tensor([[True, True, False]]))
        (2.0, 1.0)
    """
    valid = values if mask is None else values[mask]
    return valid.mean().item(), valid.std(correction=0).item()
