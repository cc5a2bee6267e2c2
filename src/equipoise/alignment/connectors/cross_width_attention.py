"""Cross-attention to keys of another width: how queries attend to media."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...nn.transformer import Attention, initialize_weights
from ...tokens.token_batch import Tokens, pack

Media = Tensor | Tokens | Mapping[str, Tensor | Tokens]


class CrossWidthAttention(Attention):
    """Cross-attention from queries of width ``dim`` to a source of width ``source_dim``; recorded by ``watch``.

    Args:
        dim: width of the queries and the output.
        source_dim: width of the source, from which keys and values are projected.
        heads: number of heads, each dim / heads wide.
        bias: whether the projections have a bias.
        dropout: dropout probability.

    Example:
        >>> import torch
        >>> CrossWidthAttention(8, 5, heads=2)(torch.zeros(1, 3, 8), torch.zeros(1, 4, 5)).output.shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, dim: int, source_dim: int, *, heads: int = 1, bias: bool = True, dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, dropout=dropout)
        self.source_dim, self.reads_itself = source_dim, False
        self.query, self.out = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.key, self.value = (nn.Linear(source_dim, dim, bias=bias) for _ in range(2))
        initialize_weights(self)

    def _source(self, tokens: Tensor, source: Tensor | None) -> Tensor:
        width = None if source is None else source.shape[-1]
        if source is None or tokens.shape[-1] != self.dim or width != self.source_dim:
            raise ShapeError(
                "CrossWidthAttention", expected=f"dim = {self.dim} and source_dim = {self.source_dim}",
                got=f"{tokens.shape[-1]} and {width}",
            )  # fmt: skip
        return source


def named_media(media: Media, widths: Mapping[str, int], who: str) -> dict[str, Tokens]:
    """Converts media to name -> Tokens with zeros under their masks, and checks names and widths.

    A tensor or Tokens without a name is accepted if there is only one kind of media.
    """
    if not isinstance(media, Mapping):
        if len(widths) != 1:
            raise ConfigError(who, expected=f"media by name: {', '.join(widths)}", got=type(media).__name__)
        media = {next(iter(widths)): media}
    if set(media) != set(widths):
        raise ConfigError(who, expected=f"media {sorted(widths)}", got=f"{sorted(media)}", fix="Mask missing media.")
    parts = {}
    for name, width in widths.items():
        part = media[name]
        if not isinstance(part, Tokens):
            if part.ndim != 3:
                raise ShapeError(f"{who} '{name}'", expected="(batch, token, dim)", got=f"shape {tuple(part.shape)}")
            part = Tokens(part)
        if part.dim != width:
            raise ShapeError(f"{who} '{name}'", expected=f"width = {width}", got=f"{part.dim}")
        parts[name] = part.zero_masked()
    return parts


def concatenate_media(media: Media, dim: int, who: str) -> Tokens:
    """Concatenates all kinds of media to one sequence with modality labels."""
    parts = media if isinstance(media, Mapping) else {"media": media}
    if not parts:
        raise ConfigError(who, expected="at least one kind of media", got="none")
    return pack(named_media(parts, dict.fromkeys(parts, dim), who))
