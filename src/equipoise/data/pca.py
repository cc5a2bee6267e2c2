"""Principal component analysis of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class PCA:
    """Mean and principal directions.

    Attributes:
        mean: (pixel,).
        directions: (component, pixel), orthonormal, in descending order of variance.
    """

    mean: Float[Tensor, " pixel"]
    directions: Float[Tensor, "component pixel"]

    def reconstruct(self, images: Float[Tensor, "sample pixel"]) -> Float[Tensor, "sample pixel"]:
        """Projects the centered images onto the components; the mean is not added back."""
        return (images - self.mean) @ self.directions.T @ self.directions


def fit_pca(images: Float[Tensor, "sample pixel"], energy: float) -> PCA:
    """Fits the fewest principal components that explain at least the fraction ``energy`` of the variance.

    Args:
        images: (sample, pixel) of the training split.
        energy: in (0, 1].

    Raises:
        ConfigError: ``energy`` is outside (0, 1].

    Example:
        >>> flat = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> fit_pca(flat, 0.8).directions.abs()
        tensor([[1., 0.]])
    """
    if not 0 < energy <= 1:
        raise ConfigError("fit_pca", expected="an energy in (0, 1]", got=f"{energy}")
    precise = images.double()
    mean = precise.mean(dim=0)
    centered = precise - mean
    variance, directions = torch.linalg.eigh(centered.T @ centered / len(images))
    variance, directions = variance.flip(0).clamp(min=0), directions.flip(1)
    explained = variance.cumsum(0) / variance.sum()
    # Rounding may leave the last cumulative sum slightly below 1.
    count = min(int((explained < energy).sum()) + 1, len(explained))
    return PCA(mean.float(), directions[:, :count].T.contiguous().float())
