"""MBT: modalities exchange information through a few bottleneck tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.transformer import Block, learned_token
from ..tokens.token_batch import SPECIAL, Output, Tokens
from .fusion_base import Fusion
from .token_streams import concatenate_streams, labels_of, mean_over_present

Exchange = Literal["bottleneck", "cross"]


class MBT(Fusion):
    """Each modality keeps its own blocks, and a few tokens F that all of them share carry what crosses over::

        [x_m ; F_m] <- Block_ml([x_m ; F])   for each modality m of layer l,      F <- mean_m F_m
        y = mean_m (W f_m + b),   f_m = norm_m(x_m) pooled: its class token, or the mean

    One head scores all modalities; both means are over those that a sample has. ``exchange="cross"`` is mid fusion
    without bottleneck: each block reads [x_m ; all other modalities' tokens] and keeps the rows of x_m.

    Args:
        dim: width of the encoders' tokens.
        depth: fusion layers. In the first one nothing has crossed over yet.
        heads: attention heads.
        bottlenecks: number of shared tokens; with 0 the modalities do not know of each other.
        exchange: ``"bottleneck"`` or ``"cross"``.
        dropout: in training only.

    Raises:
        ConfigError: a depth below 1, a negative number of bottlenecks, an unknown exchange.

    Returns (forward): Output with features (batch, N dim): each f_m over the number of modalities that the sample has.

    It helps where sequences are long and little has to cross, at nearly the cost of unimodal encoders. Its logits are a
    sum of one part for each modality, but from the second layer on a part also says what the others have told it.

    Reference: Nagrani et al., "Attention Bottlenecks for Multimodal Fusion" (NeurIPS 2021).
    Differs from the released code in: any number of modalities, of which one that a sample lacks counts in neither
    mean; those without a class token are pooled by their mean.

    Example:
        >>> fusion = MBT(8, heads=2).build(("audio", "image")).eval()
        >>> fusion({"audio": Tokens(torch.ones(3, 5, 8)), "image": Tokens(torch.ones(3, 7, 8))}).features.shape
        torch.Size([3, 16])
    """

    def __init__(
        self, dim: int, *, depth: int = 2, heads: int = 1, bottlenecks: int = 4, exchange: Exchange = "bottleneck",
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        if depth < 1 or bottlenecks < 0 or exchange not in ("bottleneck", "cross"):
            raise ConfigError(
                "MBT",
                expected="depth >= 1, bottlenecks >= 0 and exchange 'bottleneck' or 'cross'",
                got=f"depth = {depth}, bottlenecks = {bottlenecks}, exchange = '{exchange}'",
            )
        self.depth, self.heads, self.exchange, self.dropout = depth, heads, exchange, dropout
        self.bottleneck = learned_token(bottlenecks, dim) if bottlenecks and exchange == "bottleneck" else None

    def _build(self) -> None:
        def blocks() -> nn.ModuleList:
            return nn.ModuleList(Block(self.dim, self.heads, dropout=self.dropout) for _ in range(self.depth))

        self.blocks = nn.ModuleDict({name: blocks() for name in self.names})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(self.dim, eps=1e-6) for name in self.names})
        for stack in self.blocks.values():
            for block in cast(nn.ModuleList, stack):
                cast(Block, block).attention.names = self.names

    @property
    def out_dim(self) -> int:
        return self.dim * len(self.names)

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        streams, first = tokens, next(iter(tokens.values())).values
        shared = first[:, :0]
        if self.bottleneck is not None:
            shared = self.bottleneck.to(first.dtype).expand(len(first), -1, -1)
        for layer in range(self.depth):
            if self.exchange == "cross":
                streams = self._cross(streams, layer)
            else:
                streams, shared = self._through_bottleneck(streams, shared, layer)
        normed = [replace(part, values=self.norms[name](part.values)) for name, part in streams.items()]
        features = torch.cat(mean_over_present([part.pooled() for part in normed], normed), dim=-1)
        return Output(features=features, tokens=tokens, names=self.names)

    def _through_bottleneck(
        self, streams: dict[str, Tokens], shared: Tensor, layer: int
    ) -> tuple[dict[str, Tokens], Tensor]:
        found, bottlenecks = {}, []
        for number, (name, part) in enumerate(streams.items()):
            parts = [part, Tokens(shared)]
            read, labels = concatenate_streams(parts), labels_of(parts, [number, SPECIAL])
            values = self._block(name, layer)(read.values, mask=read.mask, **self._watched(labels)).output
            found[name] = replace(part, values=values[:, : len(part)])
            bottlenecks.append(values[:, len(part) :])
        return found, torch.stack(mean_over_present(bottlenecks, list(streams.values()))).sum(dim=0)

    def _cross(self, streams: dict[str, Tokens], layer: int) -> dict[str, Tokens]:
        found = {}
        for name, part in streams.items():
            # Its own tokens first, so that the block can compute their rows alone.
            order = [name, *(other for other in streams if other != name)]
            parts = [streams[key] for key in order]
            read, labels = concatenate_streams(parts), labels_of(parts, [self.names.index(key) for key in order])
            values = self._block(name, layer)(
                read.values, rows=len(part), mask=read.mask, **self._watched(labels)
            ).output
            found[name] = replace(part, values=values)
        return found

    def _watched(self, labels: Tensor) -> dict[str, Any]:
        """Labels for whoever watches; no share is computed for them here."""
        return {"modality": labels, "num_modalities": len(self.names), "share": False}

    def _block(self, name: str, layer: int) -> nn.Module:
        return cast(nn.ModuleList, self.blocks[name])[layer]

    def head(self, num_outputs: int) -> nn.Module:
        return AveragedHead(len(self.names), self.dim, num_outputs)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """W f_m over the number of modalities that the sample has, + b / N."""
        if not isinstance(head, AveragedHead):
            return None
        # Features of autocast may be narrower than the head's weights, and autocast over.
        pieces = head.pieces(output.features.to(head.linear.weight.dtype))
        return dict(zip(self.names, pieces, strict=True))


class AveragedHead(nn.Module):
    """One linear layer for all modalities' parts of the features; the logits are added, the bias counts once."""

    def __init__(self, num_modalities: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.num_modalities, self.linear = num_modalities, nn.Linear(dim, num_outputs)

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Each modality's part of the logits."""
        bias = self.linear.bias / self.num_modalities
        pieces = features.chunk(self.num_modalities, dim=-1)
        return [nn.functional.linear(piece, self.linear.weight, bias) for piece in pieces]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.linear(features.unflatten(-1, (self.num_modalities, -1)).sum(dim=1))
