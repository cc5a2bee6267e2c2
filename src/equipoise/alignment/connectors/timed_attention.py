"""Attention between tokens with timestamps: time windows, causal masks, time biases and rotations."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from ...nn.attention import Attended
from ...nn.attention.time_masks import (
    Empty,
    Kind,
    TimeBias,
    fill_empty_rows_with_nearest,
    known_times,
    rotate_by_time,
    time_causal,
    time_differences,
    time_window,
)
from ...nn.transformer import Attention
from ...tokens.token_batch import Tokens


class TimedAttention(Attention):
    """Attention that uses the timestamps of its tokens; recorded by ``watch``.

    ``softmax(R(t_i) q_i . R(t_j) k_j / sqrt(d) + bias(t_i - t_j - lag))`` over the keys of the window. Each part is
    optional; without all of them it equals ``Attention``. Special tokens of packed sequences have no time: they attend
    to all keys, and all queries attend to them.

    Args:
        dim: model width.
        heads: number of attention heads.
        names: modality names; the bias learns a lag for each pair.
        bias: ``"gaussian"``, ``"linear"`` or None.
        width: initial width of the bias in seconds; learned.
        window: window width in seconds; None disables the window.
        causal: attend only to keys that are not later than the query, up to ``slack`` seconds.
        slack: see ``causal``.
        rotate: apply ``rotate_by_time`` to queries and keys.
        unit: seconds in which the first pair rotates by one radian.
        empty: keys of a query with an empty window: ``"nearest"`` in time (not later than the query if ``causal``), or
            ``"zero"``.
        dropout: dropout probability.

    Raises:
        ConfigError: options out of range; ShapeError: tokens without times, or of another width; an odd head width with
            ``rotate``.

    Example:
        >>> audio = Tokens(torch.randn(1, 3, 8), times=torch.tensor([[0.0, 1.0, 2.0]]))
        >>> image = Tokens(torch.randn(1, 2, 8), times=torch.tensor([[0.1, 1.1]]))
        >>> TimedAttention(8, names=("audio", "image"))(audio, image, "audio", "image").output.shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, dim: int, heads: int = 1, *, names: tuple[str, ...] = (), bias: Kind | None = "gaussian",
        width: float = 1.0, window: float | None = None, causal: bool = False, slack: float = 0.0,
        rotate: bool = False, unit: float = 1.0, empty: Empty = "nearest", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, dropout=dropout)
        if window is not None and not window >= 0:
            raise ConfigError("TimedAttention", expected="window >= 0 seconds or None", got=f"{window}")
        if empty not in ("nearest", "zero"):
            raise unknown_name("TimedAttention", "treatment of empty windows", str(empty), ("nearest", "zero"))
        if bias is not None and not names:
            raise ConfigError("TimedAttention", expected="names, for the lags of the bias", got="none")
        self.names, self.window, self.causal, self.slack = tuple(names), window, causal, slack
        self.rotate, self.unit, self.empty, self.reads_itself = rotate, unit, empty, False
        self.bias = None if bias is None else TimeBias(names, kind=bias, width=width)

    def forward(  # type: ignore[override]
        self, query: Tokens, key: Tokens | None = None, query_name: str | None = None, key_name: str | None = None
    ) -> Attended:
        """Attends from ``query`` to ``key`` (self-attention by default).

        Args:
            query, key: tokens with times; packed, or of one modality each.
            query_name, key_name: modality names of unpacked tokens, required with a bias.

        Returns:
            Attended with output (batch, query, dim), and the share if the keys are packed.
        """
        key, key_name = (query, query_name) if key is None else (key, key_name)
        query, key = self._with_known_times(query), self._with_known_times(key)
        q, k = self._split(self.query(query.values)), self._split(self.key(key.values))
        if self.rotate:
            q, k = rotate_by_time(q, query.times, unit=self.unit), rotate_by_time(k, key.times, unit=self.unit)
        mask: Tensor | None = self._mask(query, key, query_name, key_name)
        if self.bias is not None:
            bias = self.bias(query, key, query_name, key_name).to(q.dtype)[:, None]
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        attended = self.core(
            q, k, self._split(self.value(key.values)), modality=key.modality, num_modalities=len(key.names) or None,
            mask=mask, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return Attended(self.output_dropout(self.out(attended.output.transpose(1, 2).flatten(2))), attended.share)

    def _mask(
        self, query: Tokens, key: Tokens, query_name: str | None, key_name: str | None
    ) -> Bool[Tensor, "batch 1 query key"] | None:
        """Boolean attention mask; None if every query attends to all keys."""
        lag: float | Float[Tensor, "batch query key"] = 0.0
        if self.bias is not None:
            lag = self.bias.lags_between(query, key, query_name, key_name).detach()
        if not self.causal and self.window is None:
            return None if key.mask is None else key.mask[:, None, None]
        times, options = (query.times, key.times), {"lag": lag, "valid": key.mask, "empty": "zero"}
        allowed = key.valid()[:, None]
        if self.causal:
            allowed = time_causal(*times, slack=self.slack, **options)  # type: ignore[arg-type]
        if self.window is None:
            return allowed[:, None]
        mask = allowed & time_window(*times, width=self.window, **options)  # type: ignore[arg-type]
        if self.empty == "nearest":
            mask = fill_empty_rows_with_nearest(mask, time_differences(*times, lag).abs(), allowed)  # type: ignore[arg-type]
        return mask[:, None]

    def _with_known_times(self, tokens: Tokens) -> Tokens:
        """Zeros masked tokens, and removes the times of special and masked tokens."""
        if tokens.times is None or tokens.dim != self.dim:
            raise ShapeError(
                "TimedAttention", expected=f"tokens with times, dim = {self.dim}",
                got=f"dim = {tokens.dim}, {'no times' if tokens.times is None else 'times'}",
            )  # fmt: skip
        return replace(tokens.zero_masked(), times=known_times(tokens))
