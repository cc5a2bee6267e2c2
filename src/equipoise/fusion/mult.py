"""MulT: directional cross-attention between all pairs of modalities, followed by self-attention."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.transformer import Block, initialize_weights
from ..tokens.token_batch import Output, Tokens
from .readout_attention import Readout, ReadoutFusion
from .token_streams import last_valid, ranks

MEMORY_DEPTH = 3
"""Minimum number of layers of a memory encoder."""


class MulT(ReadoutFusion):
    """Multimodal Transformer (MulT): pairwise cross-modal attention for unaligned sequences::

        P_m = T_m W_m                                                       (no bias)
        Z_nm = CrossEncoder(queries P_m, keys P_n)      for every target m and source n != m
        H_m = MemoryEncoder([Z_nm over n, concatenated on the feature axis])
        h = [H_m at the last valid token, over m],    y = W_o (h + W_2 dropout(relu(W_1 h)))

    Every layer attends to the embedded source sequence, normalized by the target's norm; the source is not updated. A
    single modality attends to itself. Sources are in alphabetical order, so the declared order affects only the order
    of h.

    Args:
        dim: width of the encoders' tokens.
        width: width w of the cross encoders; the memory encoders have width (N - 1) w.
        heads: attention heads of all encoders.
        depth: layers of a cross encoder; a memory encoder has max(depth, 3).
        dropout: dropout probability of attention, hidden layers and residual branches, in training only.
        embed_dropout: dropout probability of the embedded sequences.
        out_dropout: dropout probability inside the head.
        causal: mask keys that are further ahead of the query than the difference between the sequence lengths. For
            time series.
        readout, readout_heads: ``"attention"`` adds joint attention over the final streams; see ``ReadoutFusion``.

    Raises:
        ConfigError: width or depth is below 1, width is not divisible by heads, or the readout is unknown.

    Returns (forward): Output with features (batch, N (N - 1) w), preceded by the (N - 1) w features of the readout, if
    any.

    Suitable if modalities complement each other at different times and sequences are short: there are N (N - 1) cross
    encoders. Each modality is represented by its last token, which is a poor summary if the end of a sequence carries
    little information.

    Reference: Tsai et al., "Multimodal Transformer for Unaligned Multimodal Language Sequences" (ACL 2019).
    Differs from the released code in: padding is masked and excluded from positions (the release attends to it, uses
    the last step even if it is padding, and treats tokens whose first value is 0 as padding); by default ``causal`` is
    off and there is one layer (on and five in the release).

    Example:
        >>> fusion = MulT(8, width=10).build(("audio", "text")).eval()
        >>> fusion({"audio": Tokens(torch.ones(3, 5, 8)), "text": Tokens(torch.ones(3, 2, 8))}).features.shape
        torch.Size([3, 20])
    """

    def __init__(
        self, dim: int, *, width: int = 30, heads: int = 5, depth: int = 1, dropout: float = 0.1,
        embed_dropout: float = 0.25, out_dropout: float = 0.0, causal: bool = False, readout: Readout = "none",
        readout_heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(dim, readout=readout, readout_heads=readout_heads)
        if width < 1 or depth < 1:
            raise ConfigError("MulT", expected="width >= 1 and depth >= 1", got=f"width = {width}, depth = {depth}")
        if heads < 1 or width % heads:
            raise ConfigError(
                "MulT", expected=f"width = {width} divisible by heads", got=f"heads = {heads}",
                fix="The width of the streams is independent of dim; change width or heads.",
            )  # fmt: skip
        self.width, self.heads, self.depth, self.causal = width, heads, depth, causal
        self.dropout, self.embed_dropout, self.out_dropout = dropout, embed_dropout, out_dropout

    def sources(self, target: str) -> list[str]:
        """Returns the modalities to which ``target`` attends."""
        return sorted(name for name in self.names if name != target) or [target]

    @property
    def stream_dim(self) -> int:
        """Width of the memory encoders."""
        return max(len(self.names) - 1, 1) * self.width

    @property
    def out_dim(self) -> int:
        return self.stream_dim * (len(self.names) + (self.readout == "attention"))

    def _build(self) -> None:
        def encoder(width: int, depth: int) -> CrossEncoder:
            return CrossEncoder(width, depth, self.heads, dropout=self.dropout, embed_dropout=self.embed_dropout)

        self.project = nn.ModuleDict({name: nn.Linear(self.dim, self.width, bias=False) for name in self.names})
        initialize_weights(self.project)
        self.cross = nn.ModuleDict(
            {m: nn.ModuleDict({n: encoder(self.width, self.depth) for n in self.sources(m)}) for m in self.names}
        )
        memory_depth = max(self.depth, MEMORY_DEPTH)
        self.memory = nn.ModuleDict({name: encoder(self.stream_dim, memory_depth) for name in self.names})
        self._build_readout(self.stream_dim)

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        narrow = {name: replace(part, values=self.project[name](part.values)) for name, part in tokens.items()}
        streams = {}
        for name, target in narrow.items():
            encoders: nn.ModuleDict = self.cross[name]  # type: ignore[assignment]
            crossed = [encoder(target, narrow[source], causal=self.causal) for source, encoder in encoders.items()]
            joined = replace(target, values=torch.cat(crossed, dim=-1))
            streams[name] = replace(joined, values=self.memory[name](joined, joined, causal=self.causal))
        return self._read(streams, torch.cat([last_valid(stream) for stream in streams.values()], dim=-1), tokens)

    def head(self, num_outputs: int) -> nn.Module:
        return ResidualHead(self.out_dim, num_outputs, dropout=self.out_dropout)


class CrossEncoder(nn.Module):
    """Pre-norm layers of attention from one sequence to another, or of self-attention if both are the same object.

    Args:
        width: width of both sequences.
        depth: number of layers.
        heads: attention heads.
        dropout, embed_dropout: as in ``MulT``.
    """

    def __init__(self, width: int, depth: int, heads: int, *, dropout: float = 0.0, embed_dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.embed_dropout = math.sqrt(width), nn.Dropout(embed_dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout, activation=nn.ReLU) for _ in range(depth))
        for block in self.blocks:
            # Add dropout to the hidden layer.
            block.mlp.insert(2, nn.Dropout(dropout))  # type: ignore[operator, union-attr]
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, target: Tokens, source: Tokens, *, causal: bool = False) -> Float[Tensor, "batch token width"]:
        values = self._embed(target)
        # For cross-attention all layers attend to the embedded source; for self-attention, to the current values.
        memory = None if source is target else self._embed(source)
        mask = band(target, source) if causal else source.mask
        for block in self.blocks:
            values = block(values, memory, mask=mask).output
        return self.norm(values)

    def _embed(self, part: Tokens) -> Tensor:
        return self.embed_dropout(self.scale * part.values + sinusoids(ranks(part), part.values))


class ResidualHead(nn.Module):
    """y = W_o (h + W_2 dropout(relu(W_1 h)))."""

    def __init__(self, dim: int, num_outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.out = nn.Linear(dim, num_outputs)

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.out(features + self.hidden(features))


def sinusoids(positions: Tensor, like: Tensor) -> Float[Tensor, "batch token width"]:
    """Computes sinusoidal positions: sines in the first half of the features, cosines in the second.

    The last feature of an odd number is 0.
    """
    half = like.shape[-1] // 2
    exact = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(half, device=positions.device, dtype=exact)
    angles = positions[..., None] * torch.exp(steps * (-math.log(10_000) / max(half - 1, 1)))
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, like.shape[-1] % 2)).to(like.dtype)


def band(target: Tokens, source: Tokens) -> Bool[Tensor, "batch query key"]:
    """Returns True for valid keys at most | L_target - L_source | positions after the query."""
    ahead = ranks(source)[:, None, :] - ranks(target)[:, :, None]
    gap = (target.valid().sum(dim=1) - source.valid().sum(dim=1)).abs()
    return (ahead <= gap[:, None, None]) & source.valid()[:, None, :]
