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
    """Multimodal Bottleneck Transformer (MBT): separate blocks per modality that exchange information through shared
    tokens F::

        [x_m ; F_m] <- Block_ml([x_m ; F])   for each modality m of layer l,      F <- mean_m F_m
        y = mean_m (W f_m + b),   f_m = norm_m(x_m) pooled: class token or mean

    All modalities share one head; both means are over the modalities that a sample has. ``exchange="cross"`` is mid
    fusion without bottleneck: each block attends to [x_m ; tokens of all other modalities] and keeps the rows of x_m.

    Args:
        dim: width of the encoders' tokens.
        depth: number of fusion layers. In the first one, the shared tokens contain no information about the input yet.
        heads: attention heads.
        bottlenecks: number of shared tokens; with 0 the modalities exchange no information.
        exchange: ``"bottleneck"`` or ``"cross"``.
        dropout: dropout probability, in training only.

    Raises:
        ConfigError: depth is below 1, bottlenecks is negative, or exchange is unknown.

    Returns (forward): Output with features (batch, N dim): each f_m divided by the number of modalities of the sample.

    Suitable for long sequences that need to exchange little information; the cost is close to that of unimodal
    encoders. The logits are a sum of one part per modality, but from the second layer on a part also depends on the
    other modalities.

    Reference: Nagrani et al., "Attention Bottlenecks for Multimodal Fusion" (NeurIPS 2021).
    Differs from the released code in: any number of modalities; missing modalities are excluded from both means;
    modalities without a class token are pooled by their mean.

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
        outputs, bottlenecks = {}, []
        for number, (name, part) in enumerate(streams.items()):
            parts = [part, Tokens(shared)]
            joined, labels = concatenate_streams(parts), labels_of(parts, [number, SPECIAL])
            values = self._block(name, layer)(joined.values, mask=joined.mask, **self._label_arguments(labels)).output
            outputs[name] = replace(part, values=values[:, : len(part)])
            bottlenecks.append(values[:, len(part) :])
        return outputs, torch.stack(mean_over_present(bottlenecks, list(streams.values()))).sum(dim=0)

    def _cross(self, streams: dict[str, Tokens], layer: int) -> dict[str, Tokens]:
        outputs = {}
        for name, part in streams.items():
            # Own tokens first, so that the block computes only their rows.
            order = [name, *(other for other in streams if other != name)]
            parts = [streams[key] for key in order]
            joined, labels = concatenate_streams(parts), labels_of(parts, [self.names.index(key) for key in order])
            values = self._block(name, layer)(
                joined.values, rows=len(part), mask=joined.mask, **self._label_arguments(labels)
            ).output
            outputs[name] = replace(part, values=values)
        return outputs

    def _label_arguments(self, labels: Tensor) -> dict[str, Any]:
        """Returns labels for ``eq.watch``; the blocks do not compute a share."""
        return {"modality": labels, "num_modalities": len(self.names), "share": False}

    def _block(self, name: str, layer: int) -> nn.Module:
        return cast(nn.ModuleList, self.blocks[name])[layer]

    def head(self, num_outputs: int) -> nn.Module:
        return AveragedHead(len(self.names), self.dim, num_outputs)

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """Computes W f_m / (number of modalities of the sample) + b / N."""
        if not isinstance(head, AveragedHead):
            return None
        # Features computed under autocast may have lower precision than the weights of the head.
        pieces = head.pieces(output.features.to(head.linear.weight.dtype))
        return dict(zip(self.names, pieces, strict=True))


class AveragedHead(nn.Module):
    """Applies one shared linear layer to the features of each modality and adds the logits; the bias is added once."""

    def __init__(self, num_modalities: int, dim: int, num_outputs: int) -> None:
        super().__init__()
        self.num_modalities, self.linear = num_modalities, nn.Linear(dim, num_outputs)

    def pieces(self, features: Float[Tensor, "batch feature"]) -> list[Float[Tensor, "batch output"]]:
        """Computes the part of each modality in the logits."""
        bias = self.linear.bias / self.num_modalities
        pieces = features.chunk(self.num_modalities, dim=-1)
        return [nn.functional.linear(piece, self.linear.weight, bias) for piece in pieces]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.linear(features.unflatten(-1, (self.num_modalities, -1)).sum(dim=1))
