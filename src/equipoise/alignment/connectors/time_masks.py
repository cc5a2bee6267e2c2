"""Tokens that have a time: windows, biases and rotations of attention by seconds, not by places (spec 7.8)."""

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
    """``t_i - t_j - lag`` in seconds, in double precision where the times are.

    Args:
        query_times, key_times: (batch, token); NaN = no time is known.
        lag: by how much later queries are than what belongs to them; a number, or (batch, query, key).

    Raises:
        ShapeError: times that are not (batch, token), or of different batches.
    """
    for name, times in (("query", query_times), ("key", key_times)):
        if times.ndim != 2 or len(times) != len(query_times):
            raise ShapeError(
                f"differences {name}_times", expected=f"(batch, token) with batch = {len(query_times)}",
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
    """Query i may see key j where ``|t_i - t_j - lag| <= width``.

    Args:
        query_times, key_times: (batch, token) seconds; NaN = unknown: such a query sees every key, such a key is seen
            by every query.
        width: seconds.
        lag: as in ``differences``; a window has no gradient, so a learned lag needs ``time_bias``.
        valid: (batch, key), False = padding.
        empty: what a query gets whose window is empty: the key nearest in time (the first of equals), or ``"zero"``,
            nothing.

    Raises:
        ConfigError: a negative width, an unknown ``empty``. ShapeError: times that do not fit.

    Reference: spec 7.8 (a).

    Example:
        >>> time_window(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.5, 1.0, 3.0]]), width=1.0).int()
        tensor([[[1, 1, 0],
                 [0, 0, 1]]], dtype=torch.int32)
    """
    if not width >= 0:
        raise ConfigError("time_window", expected="width >= 0 seconds", got=f"{width}")
    return _filled(time_differences(query_times, key_times, lag).detach().abs(), width, valid, empty, "time_window")


def time_causal(
    query_times: Times,
    key_times: Times,
    *,
    slack: float = 0.0,
    lag: float | Tensor = 0.0,
    valid: Bool[Tensor, "batch key"] | None = None,
    empty: Empty = "zero",
) -> Bool[Tensor, "batch query key"]:
    """Query i may see key j where ``t_j <= t_i - lag + slack``: what has happened by then.

    The arguments are those of ``time_window``. With ``empty="nearest"`` a query before all keys sees the first, which
    lies in its future.

    Reference: spec 7.8 (c).

    Example:
        >>> time_causal(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]])).int()
        tensor([[[0, 0],
                 [1, 1]]], dtype=torch.int32)
    """
    ahead = -time_differences(query_times, key_times, lag).detach()
    return _filled(ahead, slack, valid, empty, "time_causal")


def _filled(distance: Tensor, most: float, valid: Tensor | None, empty: str, who: str) -> Tensor:
    if empty not in ("nearest", "zero"):
        raise unknown_name(who, "treatment of empty windows", str(empty), ("nearest", "zero"))
    if valid is not None:
        shape = (distance.shape[0], distance.shape[2])
        bool_mask(valid, f"{who} valid", f"a boolean mask (batch, key) = {shape}", shape=shape)
    there = torch.ones_like(distance, dtype=torch.bool) if valid is None else valid[:, None].expand_as(distance)
    seen = there & ((distance <= most) | distance.isnan())
    if empty == "zero":
        return seen
    return fill_empty_rows_with_nearest(seen, distance, there)


def fill_empty_rows_with_nearest(
    seen: Bool[Tensor, "batch query key"],
    distance: Float[Tensor, "batch query key"],
    there: Bool[Tensor, "batch query1 key"],
) -> Bool[Tensor, "batch query key"]:
    """``seen``, and for queries that see nothing the nearest of those keys that are ``there``, if any."""
    if distance.shape[2] == 0:
        return seen
    nearest = distance.masked_fill(~there, torch.inf).argmin(dim=2, keepdim=True)
    alone = torch.zeros_like(seen).scatter(2, nearest, True) & there
    return torch.where(seen.any(dim=2, keepdim=True), seen, alone)


def time_bias(
    query_times: Times,
    key_times: Times,
    *,
    kind: Kind = "gaussian",
    width: float | Tensor = 1.0,
    lag: float | Tensor = 0.0,
) -> Float[Tensor, "batch query key"]:
    """What is added to the logits of attention: the further apart in time, the less.

    gaussian: ``-(t_i - t_j - lag)^2 / (2 width^2)``. linear: ``-|t_i - t_j - lag| / width``. Differentiable in width
    and lag. Where a time is unknown (NaN) the bias is 0.

    Args:
        query_times, key_times: (batch, token) seconds.
        kind: gaussian forgives small differences, linear is ALiBi with seconds.
        width: seconds; the inverse of linear's slope.
        lag: as in ``differences``.

    Raises:
        ConfigError: an unknown kind, a width that is a number and not positive. ShapeError: times that do not fit.

    Reference: Press et al., ALiBi (ICLR 2022) for linear; spec 7.8 (b).

    Example:
        >>> time_bias(torch.tensor([[0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[[-0., -2.]]])
    """
    if kind not in ("gaussian", "linear"):
        raise unknown_name("time_bias", "kind", str(kind), ("gaussian", "linear"))
    if not isinstance(width, Tensor) and not width > 0:
        raise ConfigError("time_bias", expected="width > 0 seconds", got=f"{width}")
    apart = time_differences(query_times, key_times, lag)
    # Before anything is differentiated: 0 times NaN is NaN.
    apart = torch.where(apart.isnan(), 0.0, apart)
    return -(apart.square() / (2 * width**2)) if kind == "gaussian" else -(apart.abs() / width)


def rotate_by_time(
    x: Float[Tensor, "batch head token dim"], times: Times | None, *, theta: float = 10000.0, unit: float = 1.0
) -> Float[Tensor, "batch head token dim"]:
    """Turns pair k of the values of a token at time t by the angle ``theta^(-2k/dim) t / unit``.

    Pair k is (x_2k, x_2k+1). Where queries and keys are turned so, their products depend on differences of times alone.

    Args:
        x: (batch, head, token, dim), queries or keys; dim even.
        times: (batch, token) seconds; None or NaN = unknown, turned by nothing.
        theta: the slowest pair turns theta times slower than the first.
        unit: seconds in which the first pair turns by one radian.

    Raises:
        ShapeError: an odd width, times that do not fit. ConfigError: theta or unit not positive.

    Reference: Su et al., RoFormer (2021), eq. 34, with times in place of positions; spec 7.8 (d).

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
    # Seconds since 1970 leave no room for angles in single precision.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    rates = theta ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=wide) / x.shape[-1]) / unit
    angles = (times.to(x.device, wide).nan_to_num(0.0)[..., None] * rates)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def known_times(tokens: Tokens) -> Times:
    """The times of tokens, NaN = unknown for special tokens and for those under the mask.

    Raises:
        ShapeError: tokens without times.
    """
    if tokens.times is None:
        raise ShapeError("known_times", expected="tokens with times", got="times=None")
    known = tokens.valid() if tokens.modality is None else tokens.valid() & (tokens.modality != SPECIAL)
    return (
        tokens.times if tokens.mask is None and tokens.modality is None else tokens.times.masked_fill(~known, torch.nan)
    )


class TimeBias(nn.Module):
    """``time_bias`` with a learned lag for each pair of modalities, and learned widths.

    The lag of (m, n) is that of (n, m) with the other sign, and 0 within a modality and at the start: sound that comes
    0.1 seconds after the picture is found as 0.1.

    Args:
        names: of the modalities.
        kind: as in ``time_bias``.
        width: seconds at the start; a width is learned for each pair.
        learn: False keeps lags and widths.

    Raises:
        ConfigError: no name, an unknown one in ``forward``, width not positive. ShapeError: tokens without times.

    Reference: spec 7.8 (b).

    Example:
        >>> sound = Tokens(torch.zeros(1, 2, 5), times=torch.tensor([[0.0, 1.0]]))
        >>> TimeBias(("sound", "picture"))(sound, sound, "sound", "picture").shape
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
        """Seconds by which ``query`` comes later than what belongs to it in ``key``."""
        m, n = self._number(query), self._number(key)
        return (self.lags[m, n] - self.lags[n, m]) / 2

    def forward(
        self, query: Tokens, key: Tokens, query_name: str | None = None, key_name: str | None = None
    ) -> Float[Tensor, "batch query key"]:
        """A floating mask for ``attend``, give it ``[:, None]``; padding is not in it.

        Args:
            query, key: tokens with times, of one modality each, whose names are given, or packed ones, whose labels
                say it; special tokens have no lag.
            query_name, key_name: see above.
        """
        if query.times is None or key.times is None:
            raise ShapeError("TimeBias", expected="tokens with times", got="times=None")
        rows, columns = self._pairs(query, key, query_name, key_name)
        width, lag = self.log_widths[rows, columns].exp(), self.lags_between(query, key, query_name, key_name)
        return time_bias(known_times(query), known_times(key), kind=self.kind, width=width, lag=lag)

    def lags_between(
        self, query: Tokens, key: Tokens, query_name: str | None = None, key_name: str | None = None
    ) -> Float[Tensor, "batch query key"]:
        """The lag of every pair of tokens; 0 for special ones. Arguments as above."""
        rows, columns = self._pairs(query, key, query_name, key_name)
        lag = ((self.lags - self.lags.T) / 2)[rows, columns]
        return lag.masked_fill((rows < 0) | (columns < 0), 0.0)

    def _pairs(
        self, query: Tokens, key: Tokens, query_name: str | None, key_name: str | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The numbers of both modalities; -1, which reads the last, for special tokens."""
        return self._numbers(query, query_name)[:, :, None], self._numbers(key, key_name)[:, None, :]

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise unknown_name("TimeBias", "modality", name, self.names)
        return self.names.index(name)

    def _numbers(self, tokens: Tokens, name: str | None) -> Int[Tensor, "batch token"]:
        device, shape = self.lags.device, tokens.values.shape[:2]
        if name is not None:
            return torch.full(shape, self._number(name), device=device)
        if tokens.modality is None:
            raise ConfigError("TimeBias", expected="names, or packed tokens with labels", got="neither")
        # Labels of special tokens are -1, which takes the last.
        table = torch.tensor([*(self._number(each) for each in tokens.names), -1], device=device)
        return table[tokens.modality.to(device)]
