"""MODA: transformer blocks with aligned keys and attention split into self-modality and cross-modality parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..nn.attention import Attended
from ..nn.attention.modular import Merge, PseudoAttention, modular_attention
from ..nn.duplex import DuplexAligner
from ..nn.transformer import Attention, Block, learned_token, without_hidden
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion
from .token_streams import pooled_by_cls


class DuplexAttention(Attention):
    """An `Attention` that aligns its keys, and joins self and cross attention as ``merge`` says.

    Whoever watches the core sees aligned keys. A merge other than "mass", and pseudo-attention, go past the core, but
    where only the first row is read: a class token has no modality, so all keys are one part for it.
    """

    def __init__(
        self, dim: int, heads: int, num_modalities: int, *, merge: Merge, pseudo: PseudoAttention | None, dropout: float,
        **aligner: Any,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, dropout=dropout)
        self.pseudo = pseudo
        self.merge: Merge = merge
        self.aligner = DuplexAligner(self.head_dim, num_modalities, **aligner)
        self.gate = nn.Parameter(torch.zeros(heads, 1)) if merge == "gate" else None
        halves = torch.eye(self.head_dim).repeat(2, 1) / 2
        self.join = nn.Parameter(halves) if merge == "concat" else None

    def forward(
        self,
        tokens: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"] | None = None,
        *,
        modality: Int[Tensor, "... key"] | None = None,
        num_modalities: int | None = None,
        mask: Bool[Tensor, "... key"] | None = None,
        is_causal: bool = False,
        share: bool = True,
    ) -> Attended:
        """As in `Attention`; ``modality`` is needed, and the queries are the first of the tokens that are read."""
        tokens, source = without_hidden(tokens, source, mask, "DuplexAttention")
        source = tokens if source is None else source
        labels = cast(Tensor, modality)
        query, key, value = (
            self._split(part(x)) for part, x in ((self.query, tokens), (self.key, source), (self.value, source))
        )
        key = self.aligner(key, value, modality=labels, mask=mask, is_causal=is_causal).key
        dropout = self.dropout if self.training else 0.0
        if self.readout or (self.merge == "mass" and self.pseudo is None):
            attended = self.core(
                query, key, value, modality=labels, num_modalities=num_modalities, mask=mask, is_causal=is_causal,
                dropout=dropout, share=share,
            )  # fmt: skip
        else:
            found = modular_attention(
                query, key, value, modality=labels, mask=mask, is_causal=is_causal, merge=self.merge, gate=self.gate,
                pseudo=self.pseudo, dropout=dropout,
            )  # fmt: skip
            output = found.output if self.join is None else found.output @ self.join.to(found.output.dtype)
            attended = Attended(output, None)
        merged = attended.output.transpose(1, 2).flatten(2)
        return Attended(self.output_dropout(self.out(merged)), attended.share)


class MODA(Fusion):
    """Blocks over all tokens, in which each modality's keys are mapped with the others' bases, and self and cross
    attention are two parts::

        X = [c; T_1; ...; T_N],    X <- Block_l(X)  for l = 1 ... depth,    features = norm(X)[class]
        in each block:  K^m <- [K^m, K^m sum_n w_mn ||K^n^T K^n||] W_m     for the keys of modality m, n != m
                        O = merge(O_self, O_cross)

    As it starts, with ``merge="mass"`` and without pseudo-attention, it is `MidFusion` exactly.

    Args:
        dim: width of the encoders' tokens.
        depth: fused blocks.
        heads: attention heads.
        ratio: width of the blocks' hidden layers over ``dim``.
        dropout: in training only.
        merge: ``"mass"``, ``"gate"`` (one learned gate a head, 1/2 at the start), ``"sum"`` or ``"concat"`` (a learned
            map of both, their mean at the start).
        pseudo: ``"none"``, or ``"all_masked"``: hidden keys, those of missing modalities and padding, take attention.
            No key is hidden by causality here, and so with neither nothing changes where all tokens are there.
        basis, norm, normalize_keys, fuse, mix: see `DuplexAligner`.
        directions: names of the modalities whose keys change; None = all.

    Attributes:
        attention: the last block's layer, whose class row pools: where RollingQ attaches.

    Raises:
        ConfigError: a depth below 1, an option that does not exist, directions that are no modalities.

    Returns (forward): Output with features (batch, dim) and share (batch, head, modality) of the last class row.

    It helps where modalities' keys lie apart, so that a query meets one of them alone. The class token belongs to no
    modality: its attention is over all aligned keys at once, under every merge.

    Reference: Zhang et al., "MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and Emotion
    Understanding" (ICML 2025).
    Differs from the released code in: that changes the keys of one modality only, with a key-value matrix, by a loop
    over samples, and has no modular mask; here is what the paper says, for encoders and any number of modalities.

    Example:
        >>> fusion = MODA(8, heads=2).build(("audio", "image")).eval()
        >>> out = fusion({"audio": Tokens(torch.ones(3, 5, 8)), "image": Tokens(torch.ones(3, 7, 8))})
        >>> out.features.shape, out.share.shape
        (torch.Size([3, 8]), torch.Size([3, 2, 2]))
    """

    name = "moda"

    def __init__(
        self, dim: int, *, depth: int = 2, heads: int = 1, ratio: float = 4.0, dropout: float = 0.0,
        merge: Merge = "mass", pseudo: Literal["none", "all_masked"] = "none", basis: str = "gram", norm: str = "row",
        normalize_keys: bool = True, fuse: str = "concat", mix: str = "uniform",
        directions: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        if depth < 1:
            raise ConfigError("MODA", expected="depth >= 1", got=f"depth = {depth}")
        for option, given, known in (("merge", merge, get_args(Merge)), ("pseudo", pseudo, ("none", "all_masked"))):
            if given not in known:
                raise unknown_name("MODA", option, str(given), known)
        self.depth, self.heads, self.ratio, self.dropout = depth, heads, ratio, dropout
        self.pseudo, self.directions = pseudo, directions
        self.merge: Merge = merge
        self._aligner = {"basis": basis, "norm": norm, "normalize_keys": normalize_keys, "fuse": fuse, "mix": mix}
        DuplexAligner(1, **self._aligner)
        self.cls = learned_token(dim)

    @property
    def attention(self) -> Attention:
        return cast(Block, self.blocks[-1]).attention

    def _build(self) -> None:
        for name in self.directions or ():
            if name not in self.names:
                raise unknown_name("MODA directions", "modality", name, self.names)
        changed = None if self.directions is None else [self.names.index(name) for name in self.directions]
        pseudo = None if self.pseudo == "none" else PseudoAttention(count="all_masked")
        blocks = []
        for _ in range(self.depth):
            block = Block(self.dim, self.heads, ratio=self.ratio, dropout=self.dropout)
            block.attention = DuplexAttention(
                self.dim, self.heads, len(self.names), merge=self.merge, pseudo=pseudo, dropout=self.dropout,
                directions=changed, basis_scope="all", **self._aligner,
            )  # fmt: skip
            block.attention.names = self.names
            blocks.append(block)
        # In the last block only the class token reads, and it has no two parts to join.
        last = blocks[-1].attention
        last.readout, last.gate, last.join = True, None, None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)

    @property
    def out_dim(self) -> int:
        return self.dim

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        return pooled_by_cls(tokens, self.cls, self.blocks, self.norm, rows=1)
