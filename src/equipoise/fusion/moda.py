"""MODA: transformer blocks with aligned keys and attention split into self-modality and cross-modality parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..nn.attention import Attended
from ..nn.attention.modular import Merge, PseudoAttention, modular_attention
from ..nn.duplex import DuplexAligner
from ..nn.transformer import Attention, Block, learned_token
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion
from .token_streams import pooled_by_cls


class DuplexAttention(Attention):
    """`Attention` with aligned keys and a ``merge`` of the self-modality and cross-modality parts.

    Hooks on ``core`` receive aligned keys. Merges other than "mass" and pseudo-attention bypass the core, except if
    only the class token is a query: it has no modality, so all keys form one part."""

    def __init__(
        self,
        dim: int,
        heads: int,
        num_modalities: int,
        *,
        merge: Merge,
        pseudo: PseudoAttention | None,
        dropout: float,
        **aligner: Any,
    ) -> None:
        super().__init__(dim, heads, dropout=dropout)
        self.pseudo = pseudo
        self.merge: Merge = merge
        self.aligner = DuplexAligner(self.head_dim, num_modalities, **aligner)
        self.gate = nn.Parameter(torch.zeros(heads, 1)) if merge == "gate" else None
        mean = torch.eye(self.head_dim).repeat(2, 1) / 2
        self.join = nn.Parameter(mean) if merge == "concat" else None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Attended:
        """Aligns the keys and computes the attention; ``modality`` is required, and the queries are the first keys."""
        common = {name: options[name] for name in ("modality", "mask", "is_causal")}
        key = self.aligner(key, value, **common).key
        if self.readout or (self.merge == "mass" and self.pseudo is None):
            return self.core(query, key, value, **options)
        output = modular_attention(
            query,
            key,
            value,
            merge=self.merge,
            gate=self.gate,
            pseudo=self.pseudo,
            dropout=options["dropout"],
            **common,
        ).output
        return Attended(output if self.join is None else output @ self.join.to(output.dtype), None)


class MODA(Fusion):
    """Modular duplex attention (MODA): blocks over all tokens with aligned keys and separate self and cross attention::

        X = [c; T_1; ...; T_N],    X <- Block_l(X)  for l = 1 ... depth,    features = norm(X)[class]
        in each block:  K^m <- [K^m, K^m sum_n w_mn ||K^n^T K^n||] W_m     for the keys of modality m, n != m
                        O = merge(O_self, O_cross)

    At initialization, with ``merge="mass"`` and without pseudo-attention, it is identical to `MidFusion`.

    Args:
        dim: width of the encoders' tokens.
        depth: number of fused blocks.
        heads: attention heads.
        ratio: width of the blocks' hidden layers divided by ``dim``.
        dropout: dropout probability, in training only.
        merge: ``"mass"``, ``"gate"`` (one learned gate per head, initialized to 1/2), ``"sum"`` or ``"concat"``
            (a learned linear map of both, initialized to their mean).
        pseudo: ``"none"``, or ``"all_masked"``: masked keys, those of missing modalities and padding, receive
            attention. There is no causal mask here, so both are equal if all tokens are valid.
        basis, norm, normalize_keys, fuse, mix: see `DuplexAligner`.
        directions: names of the modalities with aligned keys; None = all.

    Attributes:
        attention: the attention layer of the last block, whose class-token row is pooled; RollingQ attaches to it.

    Raises:
        ConfigError: depth is below 1, an option is unknown, or directions are not names of modalities.

    Returns (forward): Output with features (batch, dim) and share (batch, head, modality) of the class-token row in the
    last block.

    Suitable if the keys of the modalities are far apart, so that a query attends to one of them only. The class token
    belongs to no modality: it attends to all aligned keys at once, for every merge.

    Reference: Zhang et al., "MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and Emotion
    Understanding" (ICML 2025).
    Differs from the released code in: the release aligns the keys of one modality only, with a key-value matrix, in a
    loop over samples, and has no modular mask; this implementation follows the paper, for any number of modalities.

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
        for option, value, choices in (("merge", merge, get_args(Merge)), ("pseudo", pseudo, ("none", "all_masked"))):
            if value not in choices:
                raise unknown_name("MODA", option, str(value), choices)
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
        # In the last block the class token is the only query, and all keys form one part for it.
        last = blocks[-1].attention
        last.readout, last.gate, last.join = True, None, None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)

    @property
    def out_dim(self) -> int:
        return self.dim

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        return pooled_by_cls(tokens, self.cls, self.blocks, self.norm, rows=1)
