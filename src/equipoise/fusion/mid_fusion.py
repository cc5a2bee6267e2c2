"""Mid fusion: separate blocks per modality, followed by joint blocks over all tokens."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..nn.attention.time_masks import Kind, TimeBias
from ..nn.transformer import Attention, Block, Transformer, learned_token
from ..tokens.token_batch import Output, Tokens
from .fusion_base import Fusion
from .token_streams import pooled_by_cls


class MidFusion(Fusion):
    """Mid fusion: transformer blocks over the tokens of all modalities, on top of separate encoders::

        X = [c; T_1; ...; T_N],    X <- Block_l(X)  for l = 1 ... depth,    features = norm(X)[class]

    Fusion from block k of L on corresponds to encoders with k - 1 blocks and depth = L - k + 1; k = 1 is early fusion.

    Args:
        dim: width of the encoders' tokens.
        depth: number of fused blocks.
        heads: attention heads; as in the encoders if their blocks are copied with ``start_from``.
        ratio: width of the blocks' hidden layers divided by ``dim``.
        dropout: dropout probability, in training only.
        shortcut: compute only the class row of the last block, with equal results.
        time_bias: ``"gaussian"`` or ``"linear"`` adds a ``TimeBias`` to the attention of all blocks but the last, so
            that tokens attend to tokens of the same time::

                scores_ij = q_i . k_j / sqrt(d_h) - (t_i - t_j - lag_mn)^2 / (2 width_mn^2)        (gaussian)

            with a learned lag and width for each pair of modalities. It depends on time differences only. Class tokens
            and tokens of unknown time (NaN) have no bias. The query of the last block is the class token.
        time_width: initial width of the bias in seconds.

    Attributes:
        attention: the attention layer of the last block, whose class-token row is pooled; RollingQ attaches to it.

    Raises:
        ConfigError: depth is below 1, or below 2 with a time bias; width of the bias not positive.
        ShapeError: with a time bias, tokens without times.

    Returns (forward): Output with features (batch, dim) and share (batch, head, modality) of the class-token row in the
    last block.

    Suitable for trained encoders, whose last blocks can initialize the fused blocks (``start_from``). From the second
    fused block on, tokens contain information from the other modalities, so the share of a modality's positions is no
    longer the share of this modality alone.

    Reference: RollingQ (ICML 2025), Table 11.
    Differs from the paper in: the paper does not specify how the fused tokens are pooled; here a separate class token
    attends to them. There is no released code.

    Example:
        >>> import torch
        >>> fusion = MidFusion(8, heads=2).build(("audio", "image")).eval()
        >>> out = fusion({"audio": Tokens(torch.ones(3, 5, 8)), "image": Tokens(torch.ones(3, 7, 8))})
        >>> out.features.shape, out.share.shape
        (torch.Size([3, 8]), torch.Size([3, 2, 2]))
    """

    name = "mid"

    def __init__(
        self, dim: int, *, depth: int = 2, heads: int = 1, ratio: float = 4.0, dropout: float = 0.0,
        shortcut: bool = True, time_bias: Kind | None = None, time_width: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        if depth < 1:
            raise ConfigError("MidFusion", expected="depth >= 1", got=f"depth = {depth}")
        if time_bias is not None and (depth < 2 or not time_width > 0):
            raise ConfigError(
                "MidFusion", expected="depth >= 2 and time_width > 0 with a time bias",
                got=f"depth = {depth}, time_width = {time_width}",
                fix="The query of the last block is the class token, which has no time.",
            )  # fmt: skip
        if time_bias not in (None, "gaussian", "linear"):
            raise unknown_name("MidFusion", "time_bias", str(time_bias), ("gaussian", "linear"))
        self.depth, self.shortcut = depth, shortcut
        self.time_bias: Kind | None = time_bias
        self.time_width = time_width
        self.cls = learned_token(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, ratio=ratio, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention.readout = True

    @property
    def attention(self) -> Attention:
        return cast(Block, self.blocks[-1]).attention

    def start_from(self, encoder: Transformer) -> None:
        """Copies the last blocks and the norm of a trained encoder, from which these blocks are then removed::

            fusion.start_from(image.transformer) for trained in (audio.transformer, image.transformer):
                del trained.blocks[-fusion.depth:]

        Raises:
            ConfigError: the encoder has fewer blocks than the fusion, or blocks of other sizes.
        """
        blocks = list(encoder.blocks)[-self.depth :]
        mine, theirs = ([_sizes(block) for block in stack] for stack in (self.blocks, blocks))
        if mine != theirs:
            raise ConfigError(
                "MidFusion.start_from",
                expected=f"{self.depth} blocks with (dim, heads, hidden) = {mine[0]}",
                got=f"{len(blocks)} with {theirs[0] if theirs else 'nothing'}",
                fix="Use the encoder's dim, heads and ratio, and a depth of at most its number of blocks.",
            )
        for block, trained in zip(self.blocks, blocks, strict=True):
            block.load_state_dict(trained.state_dict())
        self.norm.load_state_dict(encoder.norm.state_dict())

    def _build(self) -> None:
        for block in self.blocks:
            cast(Block, block).attention.names = self.names
        if self.time_bias is not None:
            self.biases = nn.ModuleList(
                TimeBias(self.names, kind=self.time_bias, width=self.time_width) for _ in range(self.depth - 1)
            )

    @property
    def out_dim(self) -> int:
        return self.dim

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        rows = 1 if self.shortcut else None
        if self.time_bias is None:
            return pooled_by_cls(tokens, self.cls, self.blocks, self.norm, rows=rows)
        for name, part in tokens.items():
            if len(part) and part.times is None:
                raise ShapeError(
                    f"MidFusion '{name}'", expected="tokens with times, for the time bias", got="times=None",
                    fix=f"Pass batch['times']['{name}'] and use an encoder that takes times, such as SequenceEncoder; "
                    "or build MidFusion without time_bias.",
                )  # fmt: skip
        return pooled_by_cls(tokens, self.cls, self.blocks, self.norm, rows=rows, biases=list(self.biases))


def _sizes(block: nn.Module) -> tuple[int, int, int]:
    block = cast(Block, block)
    return block.attention.dim, block.attention.heads, cast(nn.Linear, block.mlp[0]).out_features
