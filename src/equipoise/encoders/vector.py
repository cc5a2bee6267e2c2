"""Encoder of feature vectors: one token per sample."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.transformer import initialize_weights
from ..tokens.token_batch import Tokens
from .encoder import Encoder


class VectorEncoder(Encoder):
    """Multilayer perceptron over a feature vector; its output is the only token of the sample.

    ::

        h_0 = x,   h_i = dropout(GELU(h_(i-1) W_i + b_i))        depth times
        token = LN(h_depth A + a)

    Args:
        features: length of the vector.
        dim: token width.
        depth: number of hidden layers; 0 is a linear projection and its norm.
        hidden: width of the hidden layers; by default ``dim``.
        dropout: dropout probability, in training only.

    Raises:
        ConfigError: features, dim or hidden below 1, or a negative depth.
        ShapeError: the inputs are not floating-point vectors of this length.

    Example:
        >>> import torch
        >>> VectorEncoder(7, dim=16)(torch.zeros(3, 7)).values.shape
        torch.Size([3, 1, 16])
    """

    name = "VectorEncoder"
    reads = "(feature,)"
    takes_ids = False

    def __init__(
        self, features: int, *, dim: int, depth: int = 1, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        if min(features, dim, hidden) < 1 or depth < 0:
            raise ConfigError(
                "VectorEncoder", expected="features, dim and hidden of 1 or more, and depth >= 0",
                got=f"features = {features}, dim = {dim}, hidden = {hidden}, depth = {depth}",
            )  # fmt: skip
        self.features, self.dim = features, dim
        layers: list[nn.Module] = []
        for width in [features, *[hidden] * (depth - 1)][:depth]:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden if depth else features, dim), nn.LayerNorm(dim))
        initialize_weights(self.layers)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"features": shape[0]} if len(shape) == 1 else None

    def forward(self, values: Float[Tensor, "batch feature"]) -> Tokens:
        if values.ndim != 2 or values.shape[1] != self.features or not values.is_floating_point():
            raise ShapeError(
                "VectorEncoder", expected=f"floating-point values (batch, feature = {self.features})",
                got=f"shape {tuple(values.shape)}, {values.dtype}",
                fix="Encode sequences with SequenceEncoder, and ids with TextEncoder.",
            )  # fmt: skip
        return Tokens(self.layers(values)[:, None])
