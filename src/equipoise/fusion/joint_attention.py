"""Joint attention over the tokens of all modalities: the Vanilla multimodal transformer."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.transformer import Attention, Block, learned_token
from ..tokens.token_batch import Output, Tokens, has_values, pack, segment_labels
from .fusion_base import Fusion


class JointAttention(Fusion):
    """Vanilla multimodal transformer: a learned class token attends to the tokens of all modalities.

    Depth 1 is the paper's Vanilla MT, one bare attention layer without residual, MLP, norm or positions::

        X = [c; T_1; ...; T_N],  A = dropout(softmax(Q K^T / sqrt(d_h))),  features = dropout(A V W_O + b_O)[class]

    Depth >= 2 is Vanilla MT*: pre-norm blocks over the same sequence and a final LayerNorm; features are the row of the
    class token.

    Args:
        dim: width of the encoders' tokens.
        heads: attention heads; the reference uses one.
        depth: attention layers.
        dropout: dropout probability of attention and output, in training only.
        include_cls_key: the class token is also a key, as in the released code, so the shares sum to 1 minus its share.
            With False, as in the paper's text, shares sum to 1. Depth 1 only.
        shortcut: compute only the row of the class token, with equal results. False computes all rows, as the reference
            does; use it to count operations.
        modality_embedding: add a learned vector for each modality.
        cls_std: standard deviation of the initial class token. With 0.02, as released, attention is near uniform at
            initialization; with 1 it is selective.

    Attributes:
        attention: the layer whose class-token row is the feature; RollingQ attaches to it.

    Returns (forward): Output with features (batch, dim) and share (batch, head, modality) of the class row.

    Reference: RollingQ (ICML 2025), section 3.
    Differs from the paper in: biases, output projection and dropout as in the released code; its unused LayerNorm is
    omitted.

    Example:
        >>> fusion = JointAttention(8, heads=2).eval()
        >>> out = fusion({"audio": Tokens(torch.ones(3, 5, 8)), "image": Tokens(torch.ones(3, 7, 8))})
        >>> out.features.shape, out.share.shape
        (torch.Size([3, 8]), torch.Size([3, 2, 2]))
    """

    name = "joint"

    def __init__(
        self, dim: int, *, heads: int = 1, depth: int = 1, dropout: float = 0.2, include_cls_key: bool = True,
        shortcut: bool = True, modality_embedding: bool = False, cls_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        if depth < 1:
            raise ConfigError("JointAttention", expected="depth >= 1", got=f"depth = {depth}")
        if depth > 1 and not include_cls_key:
            raise ConfigError(
                "JointAttention",
                expected="include_cls_key=True at depth >= 2",
                got="include_cls_key=False",
                fix="With several blocks the class token must be among the keys.",
            )
        self.heads, self.depth = heads, depth
        self.include_cls_key, self.shortcut = include_cls_key, shortcut
        self._use_embedding = modality_embedding
        self.cls = learned_token(dim, std=cls_std)
        if depth == 1:
            self.attention = Attention(dim, heads, dropout=dropout)
            self.attention.reads_itself = include_cls_key
        else:
            self.blocks = nn.ModuleList(Block(dim, heads, dropout=dropout) for _ in range(depth))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        # Floating point, so that an average of weights averages it too: torch truncates averages of integers, and an
        # exponential moving average would keep the first depth forever.
        self.register_buffer("active", torch.tensor(float(depth)))
        self._active = depth
        self.register_load_state_dict_post_hook(_update_active)

    active: Tensor

    def __getattr__(self, name: str):
        # The pooling layer depends on the current depth, so it is looked up rather than registered a second time.
        if name == "attention" and "blocks" in self.__dict__.get("_modules", {}):
            return self.blocks[self.__dict__["_active"] - 1].attention
        return super().__getattr__(name)

    @property
    def layers(self) -> list[Attention]:
        """All attention layers, from first to last."""
        return [self.attention] if self.depth == 1 else [cast(Block, block).attention for block in self.blocks]

    def use_depth(self, depth: int) -> None:
        """Uses the class token after block ``depth`` and skips later blocks. For progressive training."""
        if not 1 <= depth <= self.depth:
            raise ConfigError("JointAttention.use_depth", expected=f"1 <= depth <= {self.depth}", got=str(depth))
        self.active.fill_(depth)
        self.read_active()

    def read_active(self) -> None:
        """Updates the current depth from the buffer ``active``, which copies and averages of weights change.

        Called in every forward pass, except for training steps on a GPU, to avoid a GPU sync.
        """
        if not has_values(self.active):
            return
        depth = self.active.item()
        self._active = min(max(round(depth), 1), self.depth) if math.isfinite(depth) else self.depth
        for number, layer in enumerate(self.layers, start=1):
            layer.readout = number == self._active

    def _build(self) -> None:
        for layer in self.layers:
            layer.names = self.names
        self.read_active()
        if self._use_embedding:
            self.embedding = learned_token(len(self.names), self.dim)

    @property
    def out_dim(self) -> int:
        return self.dim

    def _fuse(self, tokens: dict[str, Tokens]) -> Output:
        packed = pack(tokens, cls=self.cls)
        labels = segment_labels(packed.lengths or (), packed.values.device)
        values = packed.values
        if self._use_embedding:
            values = torch.cat([values[:, :1], values[:, 1:] + self.embedding[labels[1:]]], dim=1)
        fuse = self._one_layer if self.depth == 1 else self._stack
        features, share = fuse(values, labels, packed.mask)
        return Output(features=features, share=share, tokens=tokens, names=self.names)

    def _one_layer(self, values: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        keys = slice(0 if self.include_cls_key else 1, None)
        rows = values[:, :1] if self.shortcut else values
        attended = self.attention(
            rows, values[:, keys], modality=labels[keys], num_modalities=len(self.names),
            mask=None if mask is None else mask[:, keys],
        )  # fmt: skip
        return attended.output[:, 0], None if attended.share is None else attended.share[:, :, 0]

    def _stack(self, values: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        share = None
        if self.active.device.type == "cpu" or not (self.training and torch.is_grad_enabled()):
            self.read_active()
        for number, block in enumerate(self.blocks[: self._active], start=1):
            last = number == self._active
            # Shares are computed for the pooling layer only; the others run as plain fused attention.
            attended = block(
                values, rows=1 if last and self.shortcut else None, mask=mask,
                modality=labels, num_modalities=len(self.names), share=last,
            )  # fmt: skip
            values, share = attended.output, attended.share
        return self.norm(values[:, 0]), None if share is None else share[:, :, 0]


def _update_active(module: nn.Module, keys: object) -> None:
    if isinstance(module, JointAttention):
        module.read_active()
