"""Attention between tokens that have times: what is near in time, or has happened, is read (spec 7.8)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from ...nn.attention import Attended
from ...nn.transformer import Attention
from ...tokens.token_batch import Tokens
from .time_masks import (
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


class TimedAttention(Attention):
    """An ``Attention`` that knows when its tokens happened; ``watch`` sees it like any.

    Special tokens of packed ones have no time: they see all keys, and are seen by all.

    ``softmax(R(t_i) q_i . R(t_j) k_j / sqrt(d) + bias(t_i - t_j - lag))`` over the keys of the window. Each part can be
    left out; with none of them it is ``Attention``.

    Args:
        dim: model width.
        heads: attention heads.
        names: of the modalities, for a learned lag between each two.
        bias: ``"gaussian"``, ``"linear"`` or None.
        width: of the bias at the start, seconds; learned.
        window: seconds; None lets all keys be seen.
        causal: only keys that have happened by then, within ``slack`` seconds.
        slack: see ``causal``.
        rotate: turn queries and keys by their times, ``rotate_by_time``.
        unit: seconds in which the first pair turns by one radian.
        empty: what a query gets whose window is empty: the ``"nearest"`` key in time, with ``causal`` of those that
            have happened, or ``"zero"``.
        dropout: in training only.

    Raises:
        ConfigError: options out of range; ShapeError: tokens without times, or of another width; heads of odd width
            where they are turned.

    Reference: spec 7.8.

    Example:
        >>> sound = Tokens(torch.randn(1, 3, 8), times=torch.tensor([[0.0, 1.0, 2.0]]))
        >>> picture = Tokens(torch.randn(1, 2, 8), times=torch.tensor([[0.1, 1.1]]))
        >>> TimedAttention(8, names=("sound", "picture"))(sound, picture, "sound", "picture").output.shape
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
            raise ConfigError("TimedAttention", expected="names, whose lags the bias learns", got="none")
        self.names, self.window, self.causal, self.slack = tuple(names), window, causal, slack
        self.rotate, self.unit, self.empty, self.reads_itself = rotate, unit, empty, False
        self.bias = None if bias is None else TimeBias(names, kind=bias, width=width)

    def forward(  # type: ignore[override]
        self, query: Tokens, key: Tokens | None = None, query_name: str | None = None, key_name: str | None = None
    ) -> Attended:
        """Lets ``query`` read ``key`` (itself by default).

        Args:
            query, key: tokens with times; packed, or of one modality each.
            query_name, key_name: of tokens of one modality, where there is a bias.

        Returns:
            Attended with output (batch, query, dim), and the share where the keys are packed.
        """
        key, key_name = (query, query_name) if key is None else (key, key_name)
        query, key = self._timed(query), self._timed(key)
        q, k = self._split(self.query(query.values)), self._split(self.key(key.values))
        if self.rotate:
            q, k = rotate_by_time(q, query.times, unit=self.unit), rotate_by_time(k, key.times, unit=self.unit)
        mask: Tensor | None = self._seen(query, key, query_name, key_name)
        if self.bias is not None:
            near = self.bias(query, key, query_name, key_name).to(q.dtype)
            mask = near[:, None] if mask is None else near[:, None].masked_fill(~mask, -torch.inf)
        attended = self.core(
            q, k, self._split(self.value(key.values)), modality=key.modality, num_modalities=len(key.names) or None,
            mask=mask, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return Attended(self.output_dropout(self.out(attended.output.transpose(1, 2).flatten(2))), attended.share)

    def _seen(
        self, query: Tokens, key: Tokens, query_name: str | None, key_name: str | None
    ) -> Bool[Tensor, "batch 1 query key"] | None:
        """Keys that each query may see; None where these are all."""
        lag: float | Float[Tensor, "batch query key"] = 0.0
        if self.bias is not None:
            lag = self.bias.lags_between(query, key, query_name, key_name).detach()
        if not self.causal and self.window is None:
            return None if key.mask is None else key.mask[:, None, None]
        times, options = (query.times, key.times), {"lag": lag, "valid": key.mask, "empty": "zero"}
        there = key.valid()[:, None]
        if self.causal:
            there = time_causal(*times, slack=self.slack, **options)  # type: ignore[arg-type]
        if self.window is None:
            return there[:, None]
        seen = there & time_window(*times, width=self.window, **options)  # type: ignore[arg-type]
        if self.empty == "nearest":
            seen = fill_empty_rows_with_nearest(seen, time_differences(*times, lag).abs(), there)  # type: ignore[arg-type]
        return seen[:, None]

    def _timed(self, tokens: Tokens) -> Tokens:
        """The tokens, where special and masked ones have no time, and masked ones are 0."""
        if tokens.times is None or tokens.dim != self.dim:
            raise ShapeError(
                "TimedAttention", expected=f"tokens with times, dim = {self.dim}",
                got=f"dim = {tokens.dim}, {'no times' if tokens.times is None else 'times'}",
            )  # fmt: skip
        return replace(tokens.zero_masked(), times=known_times(tokens))
