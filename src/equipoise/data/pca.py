"""Images reduced to their principal components."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class PCA:
    """A mean and orthonormal directions around it.

    Attributes:
        mean: (pixel,).
        directions: (component, pixel), of falling variance.
    """

    mean: Float[Tensor, " pixel"]
    directions: Float[Tensor, "component pixel"]

    def reconstruct(self, images: Float[Tensor, "sample pixel"]) -> Float[Tensor, "sample pixel"]:
        """What the components keep of the images' differences from the mean; the mean is not added back."""
        return (images - self.mean) @ self.directions.T @ self.directions


def fit_pca(images: Float[Tensor, "sample pixel"], energy: float) -> PCA:
    """The fewest principal components that hold at least this part of the variance.

    Args:
        images: (sample, pixel), of the training split alone.
        energy: in (0, 1].

    Raises:
        ConfigError: an energy outside (0, 1].

    Reference: spec 9.5; there the components of the test split were fitted on the test split, here they are not.

    Example:
        >>> flat = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> principal_components(flat, 0.8).directions.abs()
        tensor([[1., 0.]])
    """
    if not 0 < energy <= 1:
        raise ConfigError("principal_components", expected="an energy in (0, 1]", got=f"{energy}")
    precise = images.double()
    mean = precise.mean(dim=0)
    centerd = precise - mean
    variance, directions = torch.linalg.eigh(centerd.T @ centerd / len(images))
    variance, directions = variance.flip(0).clamp(min=0), directions.flip(1)
    held = variance.cumsum(0) / variance.sum()
    # Rounding may leave the last sum a hair below an energy of exactly 1.
    count = min(int((held < energy).sum()) + 1, len(held))
    return PCA(mean.float(), directions[:, :count].T.contiguous().float())
