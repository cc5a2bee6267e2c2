"""Gated cross-attention (Flamingo): adds media to a frozen language model; initially the identity."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...tokens.masks import bool_mask, zero_masked
from .cross_width_attention import CrossWidthAttention
from .perceiver_resampler import feed_forward_without_bias


def media_mask(
    media_at: Bool[Tensor, "batch word"],
    media: int,
    tokens: int,
    *,
    valid: Bool[Tensor, "batch medium token"] | None = None,
) -> Bool[Tensor, "batch word key"]:
    """Mask in which word i attends to the tokens of the last medium at or before it; earlier words attend to none.

    Args:
        media_at: (batch, word), True at the position of a medium in the text.
        media: number of media per sample.
        tokens: number of tokens per medium.
        valid: (batch, medium, token), False = padding.

    Example:
        >>> media_mask(torch.tensor([[False, True, False, True]]), 2, 1).int()
        tensor([[[0, 0],
                 [1, 0],
                 [1, 0],
                 [0, 1]]], dtype=torch.int32)
    """
    bool_mask(media_at, "media_mask media_at", "a boolean mask (batch, word)")
    index: Int[Tensor, "batch word"] = media_at.cumsum(dim=1) - 1
    mask = (index[..., None] == torch.arange(media, device=index.device)).repeat_interleave(tokens, dim=2)
    if valid is None:
        return mask
    shape = (len(media_at), media, tokens)
    valid = bool_mask(valid, "media_mask valid", f"a boolean mask (batch, medium, token) = {shape}", shape=shape)
    return mask & valid.flatten(1)[:, None]


class GatedCrossAttention(nn.Module):
    """Gated cross-attention layer in front of a block of a frozen language model; the identity at initialization.

    ``x <- x + tanh(alpha) attention(LN x, media)``, then ``x <- x + tanh(beta) FFN(LN x)``; both gates are initialized
    to 0. A word attends only to the last medium before it; for text before any medium the attention adds 0.

    Args:
        dim: width of the text.
        media_dim: width of the media; ``dim`` by default.
        heads: number of attention heads, each dim / heads wide.
        ratio: hidden width of the FFN divided by ``dim``.

    Raises:
        ShapeError: in ``forward``, widths or batch sizes that do not match, or more media positions than media.

    Reference: Alayrac et al., Flamingo (NeurIPS 2022), Figure 4 and appendix A.1.2.
    Differs from the paper in: heads are dim / heads wide.

    Example:
        >>> text, media = torch.randn(2, 4, 8), torch.randn(2, 1, 3, 5)
        >>> torch.equal(GatedCrossAttention(8, 5, heads=2)(text, media), text)
        True
    """

    def __init__(self, dim: int, media_dim: int | None = None, *, heads: int = 8, ratio: float = 4.0) -> None:
        super().__init__()
        if dim < 1:
            raise ConfigError("GatedCrossAttention", expected="dim >= 1", got=f"{dim}")
        self.dim, self.media_dim = dim, dim if media_dim is None else media_dim
        self.norm = nn.LayerNorm(dim)
        self.reading = CrossWidthAttention(dim, self.media_dim, heads=heads, bias=False)
        self.ffn = feed_forward_without_bias(dim, ratio)
        self.attention_gate, self.ffn_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(
        self,
        text: Float[Tensor, "batch word dim"],
        media: Float[Tensor, "batch medium token media_dim"] | Float[Tensor, "batch token media_dim"],
        *,
        media_at: Bool[Tensor, "batch word"] | None = None,
        valid: Bool[Tensor, "batch medium token"] | None = None,
        modality: Int[Tensor, "... key"] | None = None,
    ) -> Float[Tensor, "batch word dim"]:
        """Adds information from the media to the text.

        Args:
            text: (batch, word, dim).
            media: (batch, medium, token, media_dim), or (batch, token, media_dim) for one medium.
            media_at: (batch, word), True at the position of each medium in the text; None lets all words attend to all
                media.
            valid: (batch, medium, token), False = padding.
            modality: modality labels of all media tokens, used by ``watch``.
        """
        media = media[:, None] if media.ndim == 3 else media
        if media.ndim != 4 or media.shape[0] != text.shape[0] or media.shape[-1] != self.media_dim:
            raise ShapeError(
                "GatedCrossAttention media",
                expected=f"(batch, medium, token, media_dim) with batch, media_dim = {len(text)}, {self.media_dim}",
                got=f"{tuple(media.shape)}",
            )  # fmt: skip
        if valid is not None:
            if valid.shape != media.shape[:3]:
                raise ShapeError(
                    "GatedCrossAttention valid", expected=f"{tuple(media.shape[:3])}", got=f"{tuple(valid.shape)}"
                )
            media = zero_masked(media, bool_mask(valid, "GatedCrossAttention valid", "a boolean mask"))
        mask = None if valid is None else valid.flatten(1)
        if media_at is not None:
            _check_media_at(media_at, text, media.shape[1])
            mask = media_mask(media_at, *media.shape[1:3], valid=valid)
        update = self.reading(self.norm(text), media.flatten(1, 2), mask=mask, modality=modality, share=False).output
        text = text + self.attention_gate.tanh() * update
        return text + self.ffn_gate.tanh() * self.ffn(text)


def _check_media_at(media_at: Tensor, text: Tensor, media: int) -> None:
    if media_at.shape != text.shape[:2] or media_at.dtype != torch.bool:
        raise ShapeError(
            "GatedCrossAttention media_at", expected=f"a boolean mask (batch, word) = {tuple(text.shape[:2])}",
            got=f"{tuple(media_at.shape)}, {media_at.dtype}",
        )  # fmt: skip
    # On a GPU this check would force a synchronization.
    if media_at.device.type == "cpu" and media_at.numel() and int(media_at.sum(dim=1).max()) > media:
        raise ShapeError(
            "GatedCrossAttention media_at", expected=f"at most medium = {media} positions in a text",
            got=f"{media_at.sum(dim=1).tolist()}", fix="Pass one medium for each position.",
        )  # fmt: skip
