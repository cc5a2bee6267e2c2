"""JMT: joint multimodal transformer with cross-attention between modality streams and a joint stream."""

from __future__ import annotations

from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.transformer import Attention, PostNormBlock, initialize_weights
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion
from .token_streams import equal_lengths

Joining = Literal["fc", "attention"]


class JMT(Fusion):
    """Joint Multimodal Transformer (JMT): cross-attention between all streams, including a joint stream J::

        J = W_j [x_1; ...; x_N]                    at each position; sequences are resampled to the longest length
        s <- PostNormEncoder_s(s)                  for the N modalities and J
        z_st = Attention_s(queries s, keys t)      for all (N + 1) N ordered pairs; N = 2: the six of the paper
        "fc":         features = [z_st over all pairs]
        "attention":  features = Attention(PostNormEncoder(sequence of z_st over all pairs))[last pair]

    Features are those of the class token if all modalities have one, else the mean over positions. Streams are in
    alphabetical order with J last, so the declared order has no effect.

    Args:
        dim: width of the encoders' tokens and of all streams.
        heads: attention heads.
        depth: layers of each encoder.
        ratio: width of the encoders' hidden layers divided by ``dim``.
        output: ``"fc"`` or ``"attention"``, as above.
        dropout: dropout probability, in training only.

    Raises:
        ConfigError: depth is below 1, or output is unknown.

    Returns (forward): Output with features (batch, (N + 1) N dim) for "fc", (batch, dim) for "attention".

    Suitable for sequences that are synchronous in time, since each position of J represents one moment. For tokens
    without a common order, such as patches and words, the joined positions are unrelated.

    Reference: Waligora et al., "Joint Multimodal Transformer for Emotion Recognition in the Wild" (CVPR workshops
    2024).
    Differs from the released code in: batch first throughout (the release mixes axes), any number of modalities,
    linear interpolation of unequal lengths, and the width of the encoders (512 in the release).

    Example:
        >>> fusion = JMT(8, heads=2).build(("audio", "image")).eval()
        >>> fusion({"audio": Tokens(torch.ones(3, 5, 8)), "image": Tokens(torch.ones(3, 7, 8))}).features.shape
        torch.Size([3, 48])
    """

    def __init__(
        self, dim: int, *, heads: int = 1, depth: int = 1, ratio: float = 1.0, output: Joining = "fc",
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        if depth < 1 or output not in ("fc", "attention"):
            raise ConfigError(
                "JMT",
                expected="depth >= 1 and output 'fc' or 'attention'",
                got=f"depth = {depth}, output = '{output}'",
            )
        self.heads, self.depth, self.ratio, self.output, self.dropout = heads, depth, ratio, output, dropout

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (query stream, key stream) pairs of the N + 1 streams; the joint stream is last."""
        return list(permutations(range(len(self.names) + 1), 2))

    @property
    def out_dim(self) -> int:
        return self.dim * (len(self.pairs) if self.output == "fc" else 1)

    def _build(self) -> None:
        def encoder() -> nn.Sequential:
            one = (
                PostNormBlock(self.dim, self.heads, ratio=self.ratio, dropout=self.dropout) for _ in range(self.depth)
            )
            return nn.Sequential(*one)

        def attention() -> Attention:
            return Attention(self.dim, self.heads, dropout=self.dropout)

        count = len(self.names)
        self.join = nn.Linear(count * self.dim, self.dim)
        initialize_weights(self.join)
        self.encoders = nn.ModuleList(encoder() for _ in range(count + 1))
        self.cross = nn.ModuleList(attention() for _ in range(count + 1))
        if self.output == "attention":
            self.pair_encoder, self.pair_attention = encoder(), attention()

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        ordered = [tokens[name] for name in sorted(tokens)]
        classes = all(part.cls for part in ordered)
        streams = self._streams(equal_lengths(ordered))
        # With class tokens only the first row is used, so only this row is computed.
        rows = 1 if classes else None
        crossed = torch.stack([self._cross(streams[s], streams[t], s, rows) for s, t in self.pairs], dim=2)
        query_present = torch.stack([streams[s].present() for s, _ in self.pairs], dim=1)
        if self.output == "fc":
            features = crossed.masked_fill(~query_present[:, None, :, None], 0.0).flatten(2)
        else:
            features = self._attend_over_pairs(crossed, query_present)
        joint = streams[-1]
        mask = None if joint.mask is None else joint.mask[:, :rows]
        return Output(features=Tokens(features, mask=mask).pooled(), tokens=tokens, names=self.names)

    def _streams(self, parts: list[Tokens]) -> list[Tokens]:
        """Returns the encoded streams of the modalities and the joint stream."""
        mask = None
        if parts[0].mask is not None:
            mask = torch.stack([part.valid() for part in parts]).any(dim=0)
        joint = Tokens(self.join(torch.cat([part.values for part in parts], dim=-1)), mask=mask)
        encoded = []
        for part, blocks in zip((*parts, joint), self.encoders, strict=True):
            values = part.values
            for block in blocks:  # type: ignore[attr-defined]
                values = block(values, mask=part.mask)
            encoded.append(Tokens(values, mask=part.mask))
        return encoded

    def _cross(self, target: Tokens, source: Tokens, number: int, rows: int | None) -> Tensor:
        return self.cross[number](target.values[:, :rows], source.values, mask=source.mask).output

    def _attend_over_pairs(self, crossed: Tensor, query_present: Tensor) -> Tensor:
        """Attends over the pairs at each position: (batch, position, pair, dim) to (batch, position, dim)."""
        batch, positions = crossed.shape[:2]
        sequence = crossed.flatten(0, 1)
        mask = query_present.repeat_interleave(positions, dim=0)
        for block in self.pair_encoder:
            sequence = block(sequence, mask=mask)
        # Only the last row is used.
        last = self.pair_attention(sequence[:, -1:], sequence, mask=mask).output[:, 0]
        return last.unflatten(0, (batch, positions))
