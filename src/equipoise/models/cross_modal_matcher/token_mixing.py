"""Optional attention blocks between encoders and maps, in which the items of a scene attend to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...fusion.moda import DuplexAttention
from ...nn.attention.modular import Merge
from ...nn.transformer import Block
from ...tokens.token_batch import Tokens, pack, segment_labels, unpack

Kind = Literal["none", "attention", "moda"]
KINDS = ("none", "attention", "moda")


class TokenMixing(nn.Module):
    """Transformer blocks over the items of all modalities and a final LayerNorm, with ordinary or MODA attention.

    Args:
        names: modality names.
        dim: width of the items.
        kind: ``"none"`` (the identity), ``"attention"`` or ``"moda"``, see `equipoise.fusion.MODA`.
        depth: number of blocks.
        heads: number of attention heads.
        merge: how "moda" merges its attention outputs.

    Raises:
        ConfigError: an unknown kind, a depth below 1.

    Example:
        >>> import torch
        >>> mixing = TokenMixing(("audio", "text"), 8, kind="moda", heads=2)
        >>> mixing({"audio": torch.ones(2, 3, 8), "text": torch.ones(2, 3, 8)}, {})["text"].shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, names: Sequence[str], dim: int, *, kind: Kind = "none", depth: int = 1, heads: int = 1,
        merge: Merge = "gate",
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise unknown_name("TokenMixing", "kind", str(kind), KINDS)
        if depth < 1:
            raise ConfigError("TokenMixing", expected="depth >= 1", got=f"depth = {depth}")
        self.names, self.kind = tuple(names), kind
        self.blocks = nn.ModuleList()
        self.norm = nn.Identity() if kind == "none" else nn.LayerNorm(dim, eps=1e-6)
        for _ in range(0 if kind == "none" else depth):
            block = Block(dim, heads, ratio=2.0)
            if kind == "moda":
                block.attention = DuplexAttention(
                    dim, heads, len(self.names), merge=merge, pseudo=None, dropout=0.0, basis_scope="all"
                )
            self.blocks.append(block)

    def forward(
        self, items: Mapping[str, Float[Tensor, "batch _ dim"]], present: Mapping[str, Bool[Tensor, "batch _"]]
    ) -> dict[str, Tensor]:
        """Mixes items (batch, item, dim) by name; ``present`` masks missing items, all are present by default."""
        if self.kind == "none":
            return dict(items)
        first = next(iter(items.values()))
        empty = Tokens(first.new_zeros(len(first), 0, first.shape[-1]))
        packed = pack({n: Tokens(items[n], mask=present.get(n)) if n in items else empty for n in self.names})
        labels = {
            "modality": segment_labels(packed.lengths or (), first.device), "num_modalities": len(self.names),
        }  # fmt: skip
        values = packed.values
        for block in self.blocks:
            values = block(values, mask=packed.mask, share=False, **labels).output
        mixed = unpack(Tokens(self.norm(values), packed.mask, packed.modality, packed.names, lengths=packed.lengths))
        return {name: mixed[name].values for name in self.names if name in items}
