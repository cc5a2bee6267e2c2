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
"""Of the norms, as in the language models that the release starts from."""


class MMML(ReadoutFusion):
    """Layers in which every modality reads all tokens of the others, then its own::

        x_m <- norm(x_m + attention(x_m, [x_n over n != m]))      for all m at once, from the layer's inputs
        x_m <- norm(x_m + attention(x_m, x_m))
        x_m <- norm(x_m + mlp(x_m))                               mlp with ReLU, 4 dim wide
        y = head([f_m over m]),  f_m = x_m pooled: its class token, or the mean

    The head is dropout and three linear layers with ReLU: N dim -> dim -> hidden -> outputs. A modality alone reads
    itself. The paper's loss also scores each modality alone: ``FusionModel(..., unimodal="train")``.

    Args:
        dim: width of the encoders' tokens.
        depth: layers.
        heads: attention heads.
        dropout: on attention, residual branches and the head's input, in training only.
        hidden: width of the head's second hidden layer.
        readout, readout_heads: ``"attention"`` puts joint attention on top; see ``ReadoutFusion``.

    Raises:
        ConfigError: depth or hidden below 1, an unknown readout.

    Returns (forward): Output with features (batch, N dim), and the readout's dim before them.

    It helps where modalities have to be compared token by token, as words with frames. It is the widest of the layers
    here, 16 dim^2 parameters for each modality, and overfits small data.

    Reference: Wu et al., "Multimodal Multi-loss Fusion Network for Sentiment Analysis" (NAACL 2024).
    Differs from the released code in: one layer and one head by default (five and twelve there), and any number of
    modalities, where a modality's keys are the tokens of all others.

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
        made = nn.Sequential(
            nn.Dropout(self.dropout),
            nn.Linear(self.out_dim, self.dim), nn.ReLU(),
            nn.Linear(self.dim, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, num_outputs),
        )  # fmt: skip
        initialize_weights(made)
        return made


class CrossModalLayer(nn.Module):
    """One layer of ``MMML``: 16 dim^2 + 19 dim parameters for each modality.

    Args:
        names: of the modalities.
        dim, heads, dropout: as in ``MMML``.
    """

    def __init__(self, names: Sequence[str], dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        options = {"dropout": dropout, "eps": EPS}
        self.cross = nn.ModuleDict({name: PostNormAttention(dim, heads, **options) for name in names})
        self.own = nn.ModuleDict({name: PostNormBlock(dim, heads, **options) for name in names})
        for reading in self.cross.values():
            layer = cast(PostNormAttention, reading).attention
            layer.names, layer.reads_itself = tuple(names), False
        for name, block in self.own.items():
            cast(PostNormBlock, block).reading.attention.names = (name,)

    def forward(self, streams: dict[str, Tokens]) -> dict[str, Tokens]:
        found = {}
        for name, part in streams.items():
            others = [key for key in streams if key != name] or [name]
            parts = [streams[key] for key in others]
            source, labels = concatenate_streams(parts), labels_of(parts, [list(streams).index(key) for key in others])
            values = self.cross[name](part.values, source.values, mask=source.mask, modality=labels)
            found[name] = replace(part, values=self.own[name](values, mask=part.mask))
        return found
