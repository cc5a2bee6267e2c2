"""Readout attention: one class query over the final streams of a fusion that never reads two modalities at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import unknown_name
from ..nn.transformer import Attention
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion
from .joint_attention import JointAttention

Readout = Literal["none", "attention"]


class ReadoutFusion(Fusion):
    """Base of fusions whose streams can be read by joint attention on top (spec 4.6)::

        features = [JointAttention(streams) ; pooled]

    No layer of MulT and MMML has a query that sees the keys of two modalities, so there is no share to look at and
    nothing for RollingQ to turn. Both begin with the readout.

    Args:
        dim: width of the encoders' tokens.
        readout: ``"attention"`` adds it, ``"none"`` is the published model.
        readout_heads: heads of the readout; joint attention's reference has one.

    Attributes:
        attention: the readout's layer, where RollingQ attaches; there is none with ``readout="none"``.
    """

    def __init__(self, dim: int, *, readout: Readout, readout_heads: int) -> None:
        super().__init__(dim)
        if readout not in ("none", "attention"):
            raise unknown_name(type(self).__name__, "readout", str(readout), ("none", "attention"))
        self.readout, self.readout_heads = readout, readout_heads

    @property
    def attention(self) -> Attention:
        # Without the readout this is an AttributeError, and "has it attention?" is answered with no.
        return self.joint.attention  # type: ignore[union-attr, return-value]

    def _build_readout(self, width: int) -> None:
        """Makes the readout over streams of that width, where it is wanted."""
        if self.readout == "attention":
            self.joint = JointAttention(width, heads=self.readout_heads).build(self.names)

    def _read(self, streams: Mapping[str, Tokens], pooled: Tensor, tokens: dict[str, Tokens]) -> Output:
        """The fusion's output out of its final streams and its own pooled features."""
        if self.readout == "none":
            return Output(features=pooled, tokens=tokens, names=self.names)
        read = self.joint(streams)
        features = torch.cat([read.features, pooled], dim=-1)
        return Output(features=features, share=read.share, tokens=tokens, names=self.names)
