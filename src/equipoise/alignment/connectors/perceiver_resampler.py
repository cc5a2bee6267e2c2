"""Perceiver resampler (Flamingo): reduces any number of media tokens to a fixed number of latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...nn.gradient_checkpointing import CheckpointedLayer
from ...nn.transformer import initialize_weights, learned_token
from ...tokens.token_batch import SPECIAL, Tokens
from .cross_width_attention import CrossWidthAttention, Media, concatenate_media


class Resampler(nn.Module):
    """Learned latents that attend to media and to themselves.

    Each layer: ``x <- x + attention(LN x; keys and values of [LN media ; LN x])``, then ``x <- x + FFN(LN x)``; a
    LayerNorm at the end. Projections have no bias. Frames get a learned time embedding.

    Args:
        dim: width of media and latents.
        latents: number of latents R, the number of output tokens.
        depth: number of layers.
        heads: number of attention heads, each dim / heads wide.
        frames: maximum number of frames of a medium.
        ratio: hidden width of the FFN divided by ``dim``.
        names: modality names, used by ``watch``.

    Raises:
        ConfigError: depth, latents or frames < 1. ShapeError: in ``forward``, another width or too many frames.

    Reference: Alayrac et al., Flamingo (NeurIPS 2022), appendix A.1.1.
    Differs from the paper in: heads are dim / heads wide, and several modalities may be resampled together.

    Example:
        >>> Resampler(8, latents=3, depth=1, heads=2)(torch.zeros(2, 4, 5, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, dim: int, *, latents: int = 64, depth: int = 6, heads: int = 8, frames: int = 8, ratio: float = 4.0,
        names: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if min(latents, depth, frames) < 1:
            raise ConfigError(
                "Resampler", expected="latents, depth and frames >= 1", got=f"{latents}, {depth} and {frames}"
            )  # fmt: skip
        self.dim, self.names = dim, tuple(names)
        self.latents = learned_token(1, latents, dim)
        self.times = learned_token(frames, 1, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, heads, ratio, self.names) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, media: Media) -> Float[Tensor, "batch latent dim"]:
        """Resamples media to (batch, latent, dim).

        Args:
            media: (batch, token, dim), (batch, frame, token, dim) or Tokens; name -> (batch, token, dim) or Tokens for
                several modalities, which are concatenated. In a sample without tokens the latents attend only to
                themselves.
        """
        if isinstance(media, Tensor) and media.ndim == 4:
            if media.shape[1] > len(self.times):
                raise ShapeError("Resampler", expected=f"at most {len(self.times)} frames", got=f"{media.shape[1]}")
            if media.shape[-1] != self.dim:
                raise ShapeError("Resampler", expected=f"dim = {self.dim}", got=f"{media.shape[-1]}")
            media = (media + self.times[: media.shape[1]]).flatten(1, 2)
        if isinstance(media, Mapping) and self.names:
            media = {name: media[name] for name in self.names if name in media}
        source = concatenate_media(media, self.dim, "Resampler")
        latents = self.latents.expand(len(source.values), -1, -1)
        for layer in self.layers:
            latents = layer(latents, source)
        return self.norm(latents)


class ResamplerLayer(CheckpointedLayer):
    """One layer of a ``Resampler``.

    Args:
        dim: width.
        heads: number of attention heads.
        ratio: hidden width divided by ``dim``.
        names: modality names.
    """

    def __init__(self, dim: int, heads: int, ratio: float, names: tuple[str, ...]) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.reading = CrossWidthAttention(dim, dim, heads=heads, bias=False)
        self.reading.names = names
        self.ffn = feed_forward_without_bias(dim, ratio)

    def forward(self, latents: Float[Tensor, "batch latent dim"], media: Tokens) -> Float[Tensor, "batch latent dim"]:
        normed = self.norm_latents(latents)
        source = torch.cat([self.norm_media(media.values), normed], dim=1)
        shape = normed.shape[:2]
        mask = None
        if media.mask is not None:
            mask = torch.cat([media.mask, media.mask.new_ones(shape)], dim=1)
        labels = torch.cat([media.modality, media.modality.new_full(shape, SPECIAL)], dim=1)  # type: ignore[union-attr]
        latents = latents + self.reading(normed, source, mask=mask, modality=labels, share=False).output
        return latents + self.ffn(latents)


def feed_forward_without_bias(dim: int, ratio: float) -> nn.Sequential:
    """LayerNorm and a two-layer MLP without bias, as in Flamingo."""
    hidden = int(dim * ratio)
    layers = nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
    )  # fmt: skip
    initialize_weights(layers)
    return layers
