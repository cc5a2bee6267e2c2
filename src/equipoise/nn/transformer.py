"""Attention layer, transformer blocks and stacks shared by encoders and fusions."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..tokens.masks import bool_mask, finite_masked, zero_masked
from .attention import Attended, attend
from .gradient_checkpointing import CheckpointedLayer


class AttentionCore(nn.Module):
    """Scaled dot-product attention without parameters, as a module so that hooks can observe or change its inputs.

    A ``forward_pre_hook(with_kwargs=True)`` receives the projected query (batch, head, query, dim), key and value, with
    the modality labels and the mask, and may return modified ones.
    """

    def forward(
        self,
        query: Float[Tensor, "batch head query dim"],
        key: Float[Tensor, "batch keyhead key dim"],
        value: Float[Tensor, "batch keyhead key dim"],
        *,
        modality: Int[Tensor, "... key"] | None = None,
        num_modalities: int | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        share: bool = True,
    ) -> Attended:
        return attend(
            query, key, value, modality=modality if share else None, num_modalities=num_modalities,
            mask=mask, is_causal=is_causal, dropout=dropout,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        rotation = state_dict.get(f"{prefix}rolling.rotation")
        if rotation is None or "rolling" in self._modules:
            return
        if not torch.equal(rotation, torch.eye(rotation.shape[-1]).to(rotation).expand_as(rotation)):
            # torch raises these messages with strict=False too, which would otherwise drop the rotation.
            errors.append(
                f"load_state_dict: expected a model with a RollingQ, got none to load '{prefix}rolling.rotation'. "
                "Create the RollingQ on the layer before loading, or save the weights after eq.merge_rotations."
            )


class Attention(nn.Module):
    """Multi-head attention with biases and an output projection: 4 (d^2 + d) parameters.

    Args:
        dim: model width d.
        heads: number of heads; each is d / heads wide.
        dropout: dropout probability of attention weights and projected output, in training only.

    Attributes:
        names: names of the modalities that the labels index; a single name if all keys are of one modality
            and no labels are passed.
        readout: True if only the first query row is used afterward (a class token that pools).
        reads_itself: False if the queries are not the first of the keys.
    """

    names: tuple[str, ...]
    readout: bool
    reads_itself: bool

    def __init__(self, dim: int, heads: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            closest = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads), default=1)
            raise ConfigError(
                "Attention",
                expected=f"dim = {dim} divisible by heads",
                got=f"heads = {heads}",
                fix=f"The closest divisor is heads = {closest}.",
            )
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.names, self.readout, self.reads_itself = (), False, True
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        initialize_weights(self)
        self.core = AttentionCore()
        self.output_dropout = nn.Dropout(dropout)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

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
        bias: Float[Tensor, "batch query key"] | None = None,
    ) -> Attended:
        """Computes attention from ``tokens`` to ``source`` (self-attention by default).

        Args:
            tokens: (batch, query, dim).
            source: (batch, key, dim).
            modality: (key,) or (batch, key) labels for the share; see ``attend``.
            num_modalities: number of columns of the share.
            mask: (batch, key) or (batch, query, key), boolean, True = attend. Keys that are masked for every query have
                no influence, even if they contain NaN.
            is_causal: as in ``attend``.
            share: False skips the computation of the share; the labels are then used by ``eq.watch`` only.
            bias: (batch, query, key), added to the scores of all heads, such as a ``TimeBias``.

        Returns:
            Attended with output (batch, query, dim) and share (batch, head, query, modality) or None.
        """
        tokens, source = without_hidden(tokens, source, mask, type(self).__name__)
        source = self._source(tokens, source)
        if bias is not None:
            mask = _biased(bias.to(tokens.dtype), mask)
        attended = self._attend(
            self._split(self.query(tokens)), self._split(self.key(source)), self._split(self.value(source)),
            modality=modality, num_modalities=num_modalities, mask=mask, is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0, share=share,
        )  # fmt: skip
        merged = attended.output.transpose(1, 2).flatten(2)
        return Attended(self.output_dropout(self.out(merged)), attended.share)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Attended:
        """Computes the attention of projected heads; subclasses may override it. Options as for ``AttentionCore``."""
        return self.core(query, key, value, **options)

    def _source(self, tokens: Tensor, source: Tensor | None) -> Tensor:
        """Returns the source after checking its width."""
        source = tokens if source is None else source
        if tokens.shape[-1] != self.dim or source.shape[-1] != self.dim:
            raise ShapeError(
                "Attention", expected=f"dim = {self.dim}", got=f"{tokens.shape[-1]} and {source.shape[-1]}"
            )
        return source

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Block(CheckpointedLayer):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); 12 d^2 + 13 d parameters at ratio 4.

    Args:
        dim: model width.
        heads: attention heads.
        ratio: width of the hidden layer divided by ``dim``.
        dropout: dropout probability of attention weights and both residual branches, in training only.
        activation: activation of the hidden layer.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, ratio: float = 4.0, dropout: float = 0.0,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, dropout=dropout)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = feed_forward(dim, ratio, dropout, activation)

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        source: Float[Tensor, "batch key dim"] | None = None,
        *,
        rows: int | None = None,
        modality: Int[Tensor, "... key"] | None = None,
        num_modalities: int | None = None,
        mask: Bool[Tensor, "... key"] | None = None,
        is_causal: bool = False,
        share: bool = True,
        bias: Float[Tensor, "batch query key"] | None = None,
    ) -> Attended:
        """Computes Attended(tokens, share).

        ``source`` is another sequence for cross-attention, normalized with the same norm. ``rows`` limits the
        computation to the first rows, with equal results. Other arguments as for ``Attention``.
        """
        tokens, source = without_hidden(tokens, source, mask, "Block")
        normed = self.norm_attention(tokens)
        attended = self.attention(
            normed[:, :rows], normed if source is None else self.norm_attention(source),
            modality=modality, num_modalities=num_modalities, mask=mask, is_causal=is_causal, share=share,
            **({} if bias is None else {"bias": bias[:, :rows]}),
        )  # fmt: skip
        tokens = tokens[:, :rows] + attended.output
        return Attended(tokens + self.mlp(self.norm_mlp(tokens)), attended.share)


class PostNormAttention(CheckpointedLayer):
    """norm(x + attention(x, source)): 4 (d^2 + d) + 2 d parameters.

    Args:
        dim: model width.
        heads: attention heads.
        dropout: dropout probability of attention weights and output, in training only.
        eps: epsilon of the norm.
    """

    def __init__(self, dim: int, heads: int = 1, *, dropout: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout=dropout)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        source: Float[Tensor, "batch key dim"] | None = None,
        *,
        mask: Bool[Tensor, "... key"] | None = None,
        modality: Int[Tensor, "... key"] | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """``source``, ``mask`` and ``modality`` as for ``Attention``; the labels are used by ``eq.watch`` only."""
        tokens, source = without_hidden(tokens, source, mask, "PostNormAttention")
        return self.norm(tokens + self.attention(tokens, source, mask=mask, modality=modality, share=False).output)


class PostNormBlock(CheckpointedLayer):
    """Post-norm transformer block: norm(x + attention(x)), then norm(x + mlp(x)); ReLU inside.

    Args:
        dim: model width.
        heads: attention heads.
        ratio: width of the hidden layer divided by ``dim``.
        dropout: dropout probability of attention weights and both residual branches, in training only.
        eps: epsilon of the norms.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, ratio: float = 4.0, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.reading = PostNormAttention(dim, heads, dropout=dropout, eps=eps)
        self.mlp = feed_forward(dim, ratio, dropout, nn.ReLU)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(
        self, tokens: Float[Tensor, "batch token dim"], *, mask: Bool[Tensor, "... token"] | None = None
    ) -> Float[Tensor, "batch token dim"]:
        tokens = self.reading(tokens, mask=mask)
        return self.norm(tokens + self.mlp(tokens))


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm over one sequence.

    Args:
        dim: model width.
        depth: number of blocks; with 0 only the LayerNorm is applied.
        heads: attention heads.
        ratio: width of the hidden layers divided by ``dim``.
        dropout: dropout probability, in training only.

    Example:
        >>> Transformer(8, depth=2, heads=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, depth: int, heads: int = 1, *, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, ratio=ratio, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, tokens: Float[Tensor, "batch token dim"], *, mask: Bool[Tensor, "batch token"] | None = None
    ) -> Float[Tensor, "batch token dim"]:
        for block in self.blocks:
            tokens = block(tokens, mask=mask).output
        return self.norm(tokens)


def without_hidden(
    tokens: Float[Tensor, "batch query dim"], source: Float[Tensor, "batch key dim"] | None, mask: Tensor | None,
    who: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sets source tokens to zero that are masked for every query, and returns (tokens, source).

    Without a source (self-attention), masked tokens are also queries and keep their values; only NaN and infinity are
    replaced by 0, since they would propagate to the gradients of the weights.

    Raises:
        ShapeError: the mask is not boolean.
    """
    if mask is None:
        return tokens, source
    bool_mask(mask, f"{who} mask", "a boolean mask (batch, key) or (batch, query, key)")
    if source is None:
        if not _fits(mask, tokens):
            return tokens, None
        return finite_masked(tokens, mask), None
    visible = mask
    while visible.ndim > 2:
        visible = visible.any(dim=1)
    return tokens, zero_masked(source, visible) if _fits(visible, source) else source


def _biased(bias: Tensor, mask: Tensor | None) -> Float[Tensor, "batch 1 query key"]:
    """Combines a bias with a boolean mask (batch, key) or (batch, query, key)."""
    if mask is not None:
        bias = bias.masked_fill(~(mask[:, None] if mask.ndim == 2 else mask), -torch.inf)
    return bias[:, None]


def _fits(mask: Tensor, x: Tensor) -> bool:
    # attend raises the error for masks of the wrong size.
    return mask.ndim == 2 and mask.shape[0] in (1, x.shape[0]) and mask.shape[1] == x.shape[1]


def feed_forward(dim: int, ratio: float, dropout: float, activation: type[nn.Module]) -> nn.Sequential:
    """Builds the two-layer MLP of a block, with dropout on its output."""
    hidden = int(dim * ratio)
    mlp = nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim), nn.Dropout(dropout))
    initialize_weights(mlp)
    return mlp


def initialize_weights(module: nn.Module) -> None:
    """Initializes every linear layer with Xavier-normal weights and zero biases, as RollingQ's released code does.

    torch's default initialization gives queries and keys a third of this scale, so that attention stays near uniform.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def learned_token(*shape: int, std: float = 0.02) -> nn.Parameter:
    """Creates a learned token or position table, initialized from a normal distribution truncated to [-2, 2]."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std))
