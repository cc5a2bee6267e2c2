"""MMML: post-norm layers of cross-attention to the other modalities followed by self-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..errors import ConfigError
from ..nn.transformer import PostNormAttention, PostNormBlock, initialize_weights
from ..tokens.token_batch import Output, Tokens
from .readout_attention import Readout, ReadoutFusion
from .token_streams import concatenate_streams, labels_of

EPS = 1e-12
"""Epsilon of the norms, as in the language models on which the released code builds."""


class MMML(ReadoutFusion):
    """Multimodal multi-loss fusion network (MMML): attention to the other modalities, then self-attention::

        x_m <- norm(x_m + attention(x_m, [x_n over n != m]))      for all m, from the inputs of the layer
        x_m <- norm(x_m + attention(x_m, x_m))
        x_m <- norm(x_m + mlp(x_m))                               mlp with ReLU, width 4 dim
        y = head([f_m over m]),  f_m = x_m pooled: class token or mean

    The head is dropout and three linear layers with ReLU: N dim -> dim -> hidden -> outputs. A single
    modality attends to itself. The paper also trains unimodal losses: use ``FusionModel(..., unimodal="train")``.

    Args:
        dim: width of the encoders' tokens.
        depth: number of layers.
        heads: attention heads.
        dropout: dropout probability of attention, residual branches and the input of the head, in training only.
        hidden: width of the head's second hidden layer.
        readout, readout_heads: ``"attention"`` adds joint attention over the final streams; see ``ReadoutFusion``.

    Raises:
        ConfigError: depth or hidden is below 1, or the readout is unknown.

    Returns (forward): Output with features (batch, N dim), preceded by the dim features of the readout, if any.

    Suitable if modalities have to be compared token by token, such as words with frames. Of the fusions in this package
    its layers have the most parameters, 16 dim^2 per modality, and it overfits small data sets.

    Reference: Wu et al., "Multimodal Multi-loss Fusion Network for Sentiment Analysis" (NAACL 2024).
    Differs from the released code in: one layer and one head by default (five and twelve in the release), and any
    number of modalities; the keys of each modality are the tokens of all others.

    Example:
        >>> fusion = MMML(8, heads=2).build(("audio", "text")).eval()
        >>> fusion({"audio": Tokens(torch.ones(3, 5, 8)), "text": Tokens(torch.ones(3, 7, 8))}).features.shape
        torch.Size([3, 16])
    """

    def __init__(
        self, dim: int, *, depth: int = 1, heads: int = 1, dropout: float = 0.3, hidden: int = 512,
        readout: Readout = "none", readout_heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(dim, readout=readout, readout_heads=readout_heads)
        if depth < 1 or hidden < 1:
            raise ConfigError("MMML", expected="depth >= 1 and hidden >= 1", got=f"depth = {depth}, hidden = {hidden}")
        self.depth, self.heads, self.dropout, self.hidden = depth, heads, dropout, hidden

    def _build(self) -> None:
        self.layers = nn.ModuleList(
            CrossModalLayer(self.names, self.dim, self.heads, dropout=self.dropout) for _ in range(self.depth)
        )
        self._build_readout(self.dim)

    @property
    def out_dim(self) -> int:
        return self.dim * (len(self.names) + (self.readout == "attention"))

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        streams = tokens
        for layer in self.layers:
            streams = layer(streams)
        return self._read(streams, torch.cat([part.pooled() for part in streams.values()], dim=-1), tokens)

    def head(self, num_outputs: int) -> nn.Module:
        head = nn.Sequential(
            nn.Dropout(self.dropout),
            nn.Linear(self.out_dim, self.dim), nn.ReLU(),
            nn.Linear(self.dim, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, num_outputs),
        )  # fmt: skip
        initialize_weights(head)
        return head


class CrossModalLayer(nn.Module):
    """One layer of ``MMML``: 16 dim^2 + 19 dim parameters per modality.

    Args:
        names: names of the modalities.
        dim, heads, dropout: as in ``MMML``.
    """

    def __init__(self, names: Sequence[str], dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        options = {"dropout": dropout, "eps": EPS}
        self.cross = nn.ModuleDict({name: PostNormAttention(dim, heads, **options) for name in names})
        self.own = nn.ModuleDict({name: PostNormBlock(dim, heads, **options) for name in names})
        for module in self.cross.values():
            layer = cast(PostNormAttention, module).attention
            layer.names, layer.reads_itself = tuple(names), False
        for name, block in self.own.items():
            cast(PostNormBlock, block).reading.attention.names = (name,)

    def forward(self, streams: dict[str, Tokens]) -> dict[str, Tokens]:
        outputs = {}
        for name, part in streams.items():
            others = [key for key in streams if key != name] or [name]
            parts = [streams[key] for key in others]
            source, labels = concatenate_streams(parts), labels_of(parts, [list(streams).index(key) for key in others])
            values = self.cross[name](part.values, source.values, mask=source.mask, modality=labels)
            outputs[name] = replace(part, values=self.own[name](values, mask=part.mask))
        return outputs
