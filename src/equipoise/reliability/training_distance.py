"""Distance of a sample's features to those of the training data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import NonFiniteError, ShapeError
from ..tokens.masks import at_least_float32, full_precision

NEIGHBORS = 5
"""Number of nearest training samples, k."""
CANDIDATES = 10
"""Number of training samples in a block whose distances are computed exactly."""
PROTOTYPES = 100_000
"""Default of the number of training samples above which a random subset of them serves as prototypes."""
BLOCK = 16_384
"""Number of training samples that are compared at a time."""
SHRINKAGE = 0.1
"""Weight of the identity in the covariance of standardized features."""
SMALLEST = 1e-6
"""Lower limit of distances, so that their logarithm is finite for training samples themselves."""


class TrainingFeatures:
    """Collects the features of the training samples in batches, and keeps some rows of them.

    Args:
        random: generator that selects the rows that are kept.
        most: largest number of rows that are kept.
    """

    def __init__(self, random: torch.Generator, most: int = PROTOTYPES) -> None:
        self._random, self._most = random, most
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._kept = self.count = 0
        self._sum = self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Float[Tensor, "sample feature"]) -> None:
        """Adds the rows without NaN or infinite values."""
        rows = at_least_float32(features.detach()).cpu()
        rows = rows[rows.isfinite().all(dim=1)]
        if self.count == 0:
            self._sum = self._squares = torch.zeros(rows.shape[1], dtype=torch.float64)
        self.count += len(rows)
        self._sum = self._sum + rows.double().sum(dim=0)
        self._squares = self._squares + rows.double().square().sum(dim=0)
        self._rows.append(rows)
        self._keys.append(torch.rand(len(rows), generator=self._random, dtype=torch.float64))
        self._kept += len(rows)
        if self._kept > 2 * self._most:
            self._reduce()

    def _reduce(self) -> None:
        rows, keys = torch.cat(self._rows), torch.cat(self._keys)
        if len(rows) > self._most:
            # The smallest of independent uniform numbers select a uniform random subset, in the order of the samples.
            indices = keys.argsort()[: self._most].sort().values
            rows, keys = rows[indices], keys[indices]
        self._rows, self._keys, self._kept = [rows], [keys], len(rows)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the kept rows, and the mean and standard deviation of all rows."""
        self._reduce()
        mean = self._sum / self.count
        variance = (self._squares / self.count - mean.square()).clamp(min=0)
        return self._rows[0], mean, variance.sqrt()


class TrainingDistance(nn.Module):
    """Logarithm of the distance of features to the training data.

    Features are standardized with the mean and standard deviation of the training data. Without covariance, the
    distance is the mean Euclidean distance to the five nearest training samples; with it, the Mahalanobis distance to
    the mean. Features with NaN or infinite values have an infinite distance.
    """

    center: Tensor
    scale: Tensor
    references: Tensor
    whitening: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("center", (0,)), ("scale", (0,)), ("references", (0, 0)), ("whitening", (0, 0))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("squares", torch.zeros(0), persistent=False)

    def fit(self, training: TrainingFeatures, *, covariance: bool, who: str) -> None:
        """Stores the training data.

        Raises:
            ShapeError: fewer than two training samples with finite features.
        """
        if training.count < 2:
            raise ShapeError(
                who, expected="two or more training samples with the modality and finite features",
                got=str(training.count), fix="Pass training batches that contain every modality.",
            )  # fmt: skip
        rows, mean, std = training.result()
        # Features that are constant in training keep their own scale.
        std = std.where(std > 1e-6 * (1 + mean.abs()), 1.0)
        dtype, device = rows.dtype, self.center.device
        if not bool((mean.isfinite() & std.isfinite()).all()):
            raise NonFiniteError(who, expected="finite statistics of the training features", got="an overflow")
        self.center, self.scale = mean.to(dtype).to(device), std.to(dtype).to(device)
        standardized = (rows - mean.to(dtype)) / std.to(dtype)
        if covariance:
            matrix = standardized.double().T @ standardized.double() / len(rows)
            matrix = (1 - SHRINKAGE) * matrix + SHRINKAGE * torch.eye(len(matrix), dtype=torch.float64)
            factor = torch.linalg.cholesky(matrix)
            identity = torch.eye(len(matrix), dtype=torch.float64)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            self.whitening = inverse.contiguous().to(dtype).to(device)
        else:
            self.references = standardized.to(device)
            self.squares = self.references.square().sum(dim=1)

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, " batch"]:
        """Returns log d of each sample; infinity for features that are not finite."""
        with full_precision(features):
            features = at_least_float32(features)
            features = features.to(torch.promote_types(features.dtype, self.center.dtype))
            finite = features.isfinite().all(dim=1)
            rows = (features.masked_fill(~finite[:, None], 0.0) - self.center) / self.scale
            if self.whitening.numel():
                distance = (rows @ self.whitening.to(rows.dtype).T).norm(dim=1)
            else:
                distance = self._nearest(rows)
            return distance.clamp(min=SMALLEST).log().masked_fill(~finite, torch.inf)

    def _nearest(self, rows: Float[Tensor, "batch feature"]) -> Float[Tensor, " batch"]:
        best = rows.new_zeros(len(rows), 0)
        references, norms = self.references.to(rows.dtype), self.squares
        if norms.dtype.itemsize < torch.float32.itemsize:
            # Rounded or infinite in bfloat16 or float16, to which models may be converted.
            norms = references.square().sum(dim=1)
        for block, squares in zip(references.split(BLOCK), norms.to(rows.dtype).split(BLOCK), strict=True):
            # Matrix products select candidates; their distances are computed without cancellation.
            order = torch.addmm(squares, rows.detach(), block.T, alpha=-2)
            near = order.topk(min(CANDIDATES, len(block)), dim=1, largest=False).indices
            candidates = block.index_select(0, near.flatten()).unflatten(0, near.shape)
            best = torch.cat([best, (rows[:, None] - candidates).norm(dim=2)], dim=1)
            best = best.topk(min(NEIGHBORS, best.shape[1]), dim=1, largest=False).values
        return best.mean(dim=1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[override]
        # The sizes depend on the training data of the saved distance.
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor) and stored.shape != buffer.shape:
                setattr(self, name, torch.zeros(stored.shape, dtype=stored.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.squares = self.references.square().sum(dim=1)
