"""Text encoder: word indices to tokens, with padding masked."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.transformer import Transformer, learned_token
from ..tokens.masks import bool_mask
from ..tokens.token_batch import Tokens
from .encoder import Encoder


class TextEncoder(Encoder):
    """Small transformer over words: word embeddings, positions, pre-norm blocks, final LayerNorm.

    Index 0 is padding: its tokens are masked, and columns of padding at the end are removed. ``pooled`` is the mean
    over words. An empty text is a missing modality: its mask is a row of False.

    Args:
        vocabulary: vocabulary size; indices are 0 to vocabulary - 1.
        max_length: maximum number of words.
        dim: token width.
        depth: number of blocks; 0 uses word embeddings without positions, so the order of words has no effect.
        heads: attention heads.
        dropout: dropout probability, in training only.

    Raises:
        ConfigError: vocabulary or max_length is below 1.
        ShapeError: texts are not integers, are longer than ``max_length``, or contain indices outside the vocabulary.

    Example:
        >>> encoder = TextEncoder(10, max_length=6, dim=16, depth=1, heads=2)
        >>> tokens = encoder(torch.tensor([[4, 2, 0], [7, 0, 0]]))
        >>> tokens.values.shape, tokens.mask.sum(dim=1)
        (torch.Size([2, 2, 16]), tensor([2, 1]))
    """

    name = "TextEncoder"
    reads = "(word,) integers"
    takes_ids = True

    def __init__(
        self, vocabulary: int, *, max_length: int, dim: int, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if min(vocabulary, max_length) < 1:
            raise ConfigError(
                "TextEncoder", expected="vocabulary >= 1 and max_length >= 1", got=f"{vocabulary} and {max_length}"
            )
        self.vocabulary, self.max_length, self.dim = vocabulary, max_length, dim
        self.words = learned_token(vocabulary, dim, std=dim**-0.5)
        self.positions = learned_token(max_length, dim) if depth else None
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, dropout=dropout)

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"max_length": shape[0]} if len(shape) == 1 else None

    def forward(self, words: Int[Tensor, "batch word"], mask: Bool[Tensor, "batch word"] | None = None) -> Tokens:
        """Encodes a batch. ``mask`` is True for valid words; other words are padding, whatever their index."""
        if words.ndim != 2 or words.is_floating_point() or words.dtype == torch.bool:
            raise ShapeError(
                "TextEncoder", expected="integers of shape (batch, word)",
                got=f"shape {tuple(words.shape)}, {words.dtype}", fix="Encode texts with WordVocabulary.encode(texts).",
            )  # fmt: skip
        if not 1 <= words.shape[1] <= self.max_length:
            raise ShapeError(
                "TextEncoder", expected=f"1 to {self.max_length} words", got=f"{words.shape[1]}",
                fix="Truncate the texts, or build the encoder with a larger max_length.",
            )  # fmt: skip
        if mask is not None:
            expected = f"a boolean mask (batch, word) = {tuple(words.shape)}"
            words = words.masked_fill(~bool_mask(mask, "TextEncoder mask", expected, shape=words.shape), 0)
        if words.numel() and not 0 <= int(words.min()) <= int(words.max()) < self.vocabulary:
            raise ShapeError(
                "TextEncoder", expected=f"word indices from 0 to {self.vocabulary - 1}",
                got=f"{int(words.min())} to {int(words.max())}",
                fix="Build the encoder with vocabulary = the number of words of the data set.",
            )  # fmt: skip
        mask = words > 0
        # Remove columns that are padding for all samples.
        used = mask.any(dim=0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        words, mask = words[:, :longest], mask[:, :longest]
        values = nn.functional.embedding(words, self.words)
        if self.positions is not None:
            values = values + self.positions[: words.shape[1]]
        return Tokens(self.transformer(self.dropout(values), mask=mask), mask=mask)
