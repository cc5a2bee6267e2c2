"""Readout attention: joint attention over the final token streams of a fusion."""

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
    """Base class of fusions with an optional joint attention over their final streams::

        features = [JointAttention(streams) ; pooled]

    In MulT and MMML, no query attends to keys of two modalities, so without the readout there are no shares to measure
    and no query for RollingQ to rotate.

    Args:
        dim: width of the encoders' tokens.
        readout: ``"attention"`` adds the readout, ``"none"`` is the published model.
        readout_heads: heads of the readout; the reference of joint attention uses one.

    Attributes:
        attention: the attention layer of the readout, to which RollingQ attaches; absent with ``readout="none"``.
    """

    def __init__(self, dim: int, *, readout: Readout, readout_heads: int) -> None:
        super().__init__(dim)
        if readout not in ("none", "attention"):
            raise unknown_name(type(self).__name__, "readout", str(readout), ("none", "attention"))
        self.readout, self.readout_heads = readout, readout_heads

    @property
    def attention(self) -> Attention:
        # Raises AttributeError without a readout, so that hasattr(fusion, "attention") is False.
        return self.joint.attention  # type: ignore[union-attr, return-value]

    def _build_readout(self, width: int) -> None:
        """Creates the readout for streams of the given width, if enabled."""
        if self.readout == "attention":
            self.joint = JointAttention(width, heads=self.readout_heads).build(self.names)

    def _read(self, streams: Mapping[str, Tokens], pooled: Tensor, tokens: dict[str, Tokens]) -> Output:
        """Computes the output from the final streams and the pooled features."""
        if self.readout == "none":
            return Output(features=pooled, tokens=tokens, names=self.names)
        read = self.joint(streams)
        features = torch.cat([read.features, pooled], dim=-1)
        return Output(features=features, share=read.share, tokens=tokens, names=self.names)
