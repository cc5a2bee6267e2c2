"""Projector (LLaVA): maps media tokens to the width of a language model's embeddings."""

from __future__ import annotations

import re
from dataclasses import replace

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...tokens.masks import finite_masked
from ...tokens.token_batch import Tokens
from .media_splice import Side, Spliced, splice


class Projector(nn.Module):
    """Applies the same linear layer or MLP to every token.

    ``"linear"``: W x + b. ``"mlpKx_gelu"``: a linear layer, then K - 1 times [GELU, linear layer]. ``"identity"``: x.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: width of the language model's embeddings.
        kind: ``"linear"`` (LLaVA), ``"mlp2x_gelu"`` (LLaVA-1.5), ``"mlpKx_gelu"`` or ``"identity"``.

    Raises:
        ConfigError: an unknown kind, or an identity between different widths. ShapeError: in ``forward``, another
            width.

    Reference: LLaVA (NeurIPS 2023), LLaVA-1.5 (CVPR 2024).

    Example:
        >>> import torch
        >>> Projector(5, 8)(torch.zeros(2, 3, 5)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, in_dim: int, out_dim: int, *, kind: str = "mlp2x_gelu") -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.kind = in_dim, out_dim, kind
        deep = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
        if kind == "identity":
            if in_dim != out_dim:
                raise ConfigError("Projector", expected="in_dim = out_dim for identity", got=f"{in_dim} and {out_dim}")
            self.layers = nn.Sequential()
        elif kind == "linear" or deep:
            self.layers = nn.Sequential(nn.Linear(in_dim, out_dim))
            for _ in range(int(deep[1]) - 1 if deep else 0):
                self.layers.extend([nn.GELU(), nn.Linear(out_dim, out_dim)])
        else:
            raise ConfigError(
                "Projector", expected="kind 'linear', 'identity' or 'mlpKx_gelu' with a number K", got=repr(kind),
                fix="LLaVA-1.5 uses kind='mlp2x_gelu'.",
            )  # fmt: skip

    def forward(self, tokens: Float[Tensor, "*lead token in_dim"] | Tokens) -> Tensor | Tokens:
        """Projects (..., in_dim) to (..., out_dim); Tokens keep mask, labels and times; masked NaN is treated as 0."""
        if isinstance(tokens, Tokens):
            return replace(tokens, values=self._project(finite_masked(tokens.values, tokens.mask)))
        return self._project(tokens)

    def splice(
        self,
        text_embeddings: Float[Tensor, "batch word out_dim"],
        input_ids: Int[Tensor, "batch word"],
        placeholder: int,
        tokens: Float[Tensor, "medium token in_dim"] | Tokens,
        *,
        labels: Int[Tensor, "batch word"] | None = None,
        mask: Bool[Tensor, "batch word"] | None = None,
        side: Side = "right",
    ) -> Spliced:
        """Projects media and inserts them at their placeholders; arguments and errors are those of ``splice``.

        Example:
            >>> import torch
            >>> text, media = torch.zeros(1, 3, 8), torch.ones(1, 4, 5)
            >>> Projector(5, 8).splice(text, torch.tensor([[7, 99, 8]]), 99, media).modality
            tensor([[0, 1, 1, 1, 1, 0]])
        """
        return splice(text_embeddings, input_ids, placeholder, self(tokens), labels=labels, mask=mask, side=side)

    def _project(self, values: Tensor) -> Tensor:
        if values.shape[-1] != self.in_dim:
            raise ShapeError("Projector", expected=f"in_dim = {self.in_dim}", got=f"{values.shape[-1]}")
        return self.layers(values)
