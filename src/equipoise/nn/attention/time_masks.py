"""Attention masks, biases and rotary embeddings based on timestamps in seconds instead of positions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError, unknown_name
from ...tokens.masks import bool_mask
from ...tokens.token_batch import SPECIAL, Tokens

Times = Float[Tensor, "batch token"]
Empty = Literal["nearest", "zero"]
Kind = Literal["gaussian", "linear"]


def time_differences(
    query_times: Times, key_times: Times, lag: float | Tensor = 0.0
) -> Float[Tensor, "batch query key"]:
    """Computes ``t_i - t_j - lag`` in seconds, in the precision of the times.

    Args:
        query_times, key_times: (batch, token); NaN = unknown.
        lag: delay of the queries relative to the corresponding keys; a number, or (batch, query, key).

    Raises:
        ShapeError: times that are not (batch, token), or different batch sizes.
    """
    for name, times in (("query", query_times), ("key", key_times)):
        if times.ndim != 2 or len(times) != len(query_times):
            raise ShapeError(
                f"time_differences {name}_times", expected=f"(batch, token) with batch = {len(query_times)}",
                got=f"{tuple(times.shape)}",
            )  # fmt: skip
    return query_times[:, :, None] - key_times[:, None, :] - lag


def time_window(
    query_times: Times,
    key_times: Times,
    *,
    width: float,
    lag: float | Tensor = 0.0,
    valid: Bool[Tensor, "batch key"] | None = None,
    empty: Empty = "nearest",
) -> Bool[Tensor, "batch query key"]:
    """Time window: query i attends to key j if ``|t_i - t_j - lag| <= width``.

    Args:
        query_times, key_times: (batch, token) seconds; NaN = unknown: such a query attends to every key, and every
            query attends to such a key.
        width: seconds.
        lag: as in ``time_differences``; a window has no gradient, so learning a lag requires ``time_bias``.
        valid: (batch, key), False = padding.
        empty: keys of a query with an empty window: ``"nearest"``, the key nearest in time (the first of ties), or
            ``"zero"``, none.

    Raises:
        ConfigError: a negative width, an unknown ``empty``. ShapeError: times that do not match.

    Example:
        >>> time_window(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.5, 1.0, 3.0]]), width=1.0).int()
        tensor([[[1, 1, 0],
                 [0, 0, 1]]], dtype=torch.int32)
    """
    if not width >= 0:
        raise ConfigError("time_window", expected="width >= 0 seconds", got=f"{width}")
    return _threshold(time_differences(query_times, key_times, lag).detach().abs(), width, valid, empty, "time_window")


def time_causal(
    query_times: Times,
    key_times: Times,
    *,
    slack: float = 0.0,
    lag: float | Tensor = 0.0,
    valid: Bool[Tensor, "batch key"] | None = None,
    empty: Empty = "zero",
) -> Bool[Tensor, "batch query key"]:
    """Causal mask by time: query i attends to key j if ``t_j <= t_i - lag + slack``.

    The arguments are those of ``time_window``. With ``empty="nearest"`` a query before all keys attends to the first
    key, which is in its future.

    Example:
        >>> time_causal(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]])).int()
        tensor([[[0, 0],
                 [1, 1]]], dtype=torch.int32)
    """
    ahead = -time_differences(query_times, key_times, lag).detach()
    return _threshold(ahead, slack, valid, empty, "time_causal")


def _threshold(distance: Tensor, limit: float, valid: Tensor | None, empty: str, who: str) -> Tensor:
    if empty not in ("nearest", "zero"):
        raise unknown_name(who, "treatment of empty windows", str(empty), ("nearest", "zero"))
    if valid is not None:
        shape = (distance.shape[0], distance.shape[2])
        bool_mask(valid, f"{who} valid", f"a boolean mask (batch, key) = {shape}", shape=shape)
    allowed = torch.ones_like(distance, dtype=torch.bool) if valid is None else valid[:, None].expand_as(distance)
    mask = allowed & ((distance <= limit) | distance.isnan())
    if empty == "zero":
        return mask
    return fill_empty_rows_with_nearest(mask, distance, allowed)


def fill_empty_rows_with_nearest(
    mask: Bool[Tensor, "batch query key"],
    distance: Float[Tensor, "batch query key"],
    allowed: Bool[Tensor, "batch query1 key"],
) -> Bool[Tensor, "batch query key"]:
    """Sets the nearest allowed key, if any, in rows of ``mask`` that are empty."""
    if distance.shape[2] == 0:
        return mask
    nearest = distance.masked_fill(~allowed, torch.inf).argmin(dim=2, keepdim=True)
    nearest_only = torch.zeros_like(mask).scatter(2, nearest, True) & allowed
    return torch.where(mask.any(dim=2, keepdim=True), mask, nearest_only)


def time_bias(
    query_times: Times,
    key_times: Times,
    *,
    kind: Kind = "gaussian",
    width: float | Tensor = 1.0,
    lag: float | Tensor = 0.0,
) -> Float[Tensor, "batch query key"]:
    """Bias added to attention logits that decreases with the distance in time.

    gaussian: ``-(t_i - t_j - lag)^2 / (2 width^2)``. linear: ``-|t_i - t_j - lag| / width``. Differentiable in width
    and lag. The bias is 0 if a time is unknown (NaN).

    Args:
        query_times, key_times: (batch, token) seconds.
        kind: ``"gaussian"``, or ``"linear"``, which is ALiBi with seconds.
        width: seconds; the inverse of the slope of "linear".
        lag: as in ``time_differences``.

    Raises:
        ConfigError: an unknown kind, a width that is a number and not positive. ShapeError: times that do not match.

    Reference: Press et al., ALiBi (ICLR 2022) for linear.

    Example:
        >>> time_bias(torch.tensor([[0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[[-0., -2.]]])
    """
    if kind not in ("gaussian", "linear"):
        raise unknown_name("time_bias", "kind", str(kind), ("gaussian", "linear"))
    if not isinstance(width, Tensor) and not width > 0:
        raise ConfigError("time_bias", expected="width > 0 seconds", got=f"{width}")
    difference = time_differences(query_times, key_times, lag)
    # Replace NaN before the computation: in the backward pass 0 times NaN is NaN.
    difference = torch.where(difference.isnan(), 0.0, difference)
    return -(difference.square() / (2 * width**2)) if kind == "gaussian" else -(difference.abs() / width)


def rotate_by_time(
    x: Float[Tensor, "batch head token dim"], times: Times | None, *, theta: float = 10000.0, unit: float = 1.0
) -> Float[Tensor, "batch head token dim"]:
    """Rotary embedding by time: rotates pair k of a token at time t by the angle ``theta^(-2k/dim) t / unit``.

    Pair k is (x_2k, x_2k+1). The products of rotated queries and keys depend on time differences only.

    Args:
        x: (batch, head, token, dim), queries or keys; dim even.
        times: (batch, token) seconds; None or NaN = unknown, not rotated.
        theta: ratio between the frequencies of the first and of the last pair, as in RoPE.
        unit: seconds in which the first pair rotates by one radian.

    Raises:
        ShapeError: an odd width, times that do not match. ConfigError: theta or unit not positive.

    Reference: Su et al., RoFormer (2021), eq. 34, with times in place of positions.

    Example:
        >>> rotate_by_time(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[math.pi / 2]])).round().abs()
        tensor([[[[0., 1.]]]])
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ShapeError(
            "rotate_by_time", expected="(batch, head, token, dim) with an even dim", got=f"{tuple(x.shape)}"
        )
    if not (theta > 0 and unit > 0):
        raise ConfigError("rotate_by_time", expected="theta > 0 and unit > 0", got=f"{theta} and {unit}")
    if times is None:
        return x
    if times.shape != (x.shape[0], x.shape[2]):
        raise ShapeError(
            "rotate_by_time times", expected=f"(batch, token) = {(x.shape[0], x.shape[2])}", got=f"{tuple(times.shape)}"
        )  # fmt: skip
    # Angles of Unix timestamps need double precision.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    rates = theta ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide) / x.shape[-1]) / unit
    angles = (times.to(x.device, wide).nan_to_num(0.0)[..., None] * rates)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def known_times(tokens: Tokens) -> Times:
    """Returns the times of tokens, with NaN (unknown) for special and masked tokens.

    Raises:
        ShapeError: tokens without times.
    """
    if tokens.times is None:
        raise ShapeError("known_times", expected="tokens with times", got="times=None")
    valid = tokens.valid() if tokens.modality is None else tokens.valid() & (tokens.modality != SPECIAL)
    return (
        tokens.times if tokens.mask is None and tokens.modality is None else tokens.times.masked_fill(~valid, torch.nan)
    )


class TimeBias(nn.Module):
    """``time_bias`` with a learned lag and a learned width for each pair of modalities.

    The lag of (m, n) is minus that of (n, m); it is 0 within a modality and at initialization. If the audio comes 0.1
    seconds after the image, the lag converges to 0.1.

    Args:
        names: modality names.
        kind: as in ``time_bias``.
        width: initial width in seconds of all pairs.
        learn: False freezes lags and widths.

    Raises:
        ConfigError: no name, an unknown one in ``forward``, width not positive. ShapeError: tokens without times.

    Example:
        >>> audio = Tokens(torch.zeros(1, 2, 5), times=torch.tensor([[0.0, 1.0]]))
        >>> TimeBias(("audio", "image"))(audio, audio, "audio", "image").shape
        torch.Size([1, 2, 2])
    """

    def __init__(
        self, names: tuple[str, ...], *, kind: Kind = "gaussian", width: float = 1.0, learn: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        if not names or not width > 0:
            raise ConfigError("TimeBias", expected="at least one name and width > 0", got=f"{names} and {width}")
        if kind not in ("gaussian", "linear"):
            raise unknown_name("TimeBias", "kind", str(kind), ("gaussian", "linear"))
        self.names, count = tuple(names), len(names)
        self.kind: Kind = kind
        self.lags = nn.Parameter(torch.zeros(count, count), requires_grad=learn)
        self.log_widths = nn.Parameter(torch.full((count, count), math.log(width)), requires_grad=learn)

    def lag(self, query: str, key: str) -> Float[Tensor, ""]:
        """Learned delay in seconds of ``query`` relative to the corresponding tokens of ``key``."""
        m, n = self._index(query), self._index(key)
        return (self.lags[m, n] - self.lags[n, m]) / 2

    def forward(
        self, query: Tokens, key: Tokens, query_name: str | None = None, key_name: str | None = None
    ) -> Float[Tensor, "batch query key"]:
        """Computes the bias (batch, query, key); pass ``bias[:, None]`` as the mask of ``attend``. Ignores padding.

        Args:
            query, key: tokens with times: of one modality each, with ``query_name`` and ``key_name``, or packed tokens
                with labels. Special tokens have no lag.
            query_name, key_name: modality of unpacked tokens.
        """
        if query.times is None or key.times is None:
            raise ShapeError("TimeBias", expected="tokens with times", got="times=None")
        rows, columns = self._pairs(query, key, query_name, key_name)
        width, lag = self.log_widths[rows, columns].exp(), self.lags_between(query, key, query_name, key_name)
        return time_bias(known_times(query), known_times(key), kind=self.kind, width=width, lag=lag)

    def lags_between(
        self, query: Tokens, key: Tokens, query_name: str | None = None, key_name: str | None = None
    ) -> Float[Tensor, "batch query key"]:
        """Lag of every pair of tokens; 0 for special tokens. Arguments as in ``forward``."""
        rows, columns = self._pairs(query, key, query_name, key_name)
        lag = ((self.lags - self.lags.T) / 2)[rows, columns]
        return lag.masked_fill((rows < 0) | (columns < 0), 0.0)

    def _pairs(
        self, query: Tokens, key: Tokens, query_name: str | None, key_name: str | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Modality indices of both sides, broadcastable to (batch, query, key); -1 for special tokens."""
        return self._indices(query, query_name)[:, :, None], self._indices(key, key_name)[:, None, :]

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise unknown_name("TimeBias", "modality", name, self.names)
        return self.names.index(name)

    def _indices(self, tokens: Tokens, name: str | None) -> Int[Tensor, "batch token"]:
        device, shape = self.lags.device, tokens.values.shape[:2]
        if name is not None:
            return torch.full(shape, self._index(name), device=device)
        if tokens.modality is None:
            raise ConfigError("TimeBias", expected="names, or packed tokens with labels", got="neither")
        # Special tokens have the label -1, which indexes the last entry.
        table = torch.tensor([*(self._index(each) for each in tokens.names), -1], device=device)
        return table[tokens.modality.to(device)]
