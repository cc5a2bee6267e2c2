"""SigLIP: every pair is a question of its own, answered by a sigmoid; pairs are visited in tiles (spec 7.2)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...errors import ConfigError, ShapeError
from .gather import sync_parameter_grad
from .pair_loss import Pair, PairLoss, check_pair, exact

TILE = 512
"""Rows and columns of a tile: the memory of pairs is that of a few (512, 512) matrices, however large the batch."""


def siglip(
    a: Float[Tensor, "batch dim"],
    b: Float[Tensor, "batch dim"],
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    ids: Int[Tensor, " batch"] | None = None,
    tile: int = TILE,
) -> Float[Tensor, ""]:
    """``L = -(1/batch) sum_ij log sigma(y_ij (scale a_i b_j + bias))``, y = 1 for partners and -1 for all others.

    No (batch, batch) matrix is built: tiles of it are made one after another, their gradients with them. The result
    does not depend on their size but for rounding. First derivatives alone are offered.

    Args:
        a, b: (batch, dim), normalized; row i of one is the partner of row i of the other.
        scale: s; it multiplies.
        bias: added to every logit; -10 makes up for the many wrong pairs at the start.
        ids: (batch,) rows of one id are partners; by default the diagonal alone.
        tile: rows and columns that are compared at once.

    Returns:
        The loss, in float32 or better. Every pair counts for itself, so that a batch of one, or of one id, has a loss
        of its own, of partners alone. Near 0 where all is right; at s = 10 and bias = -10 perfect vectors cost log 2.

    Raises:
        ShapeError: a and b that do not fit, no pair at all, ids of another shape. ConfigError: tile < 1.

    Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training (ICCV 2023), eq. 1; spec 7.2.

    Example:
        >>> siglip(torch.eye(2), torch.eye(2), scale=10.0, bias=-10.0)
        tensor(0.6932)
    """
    check_pair(a, b, "siglip")
    if tile < 1:
        raise ConfigError("siglip", expected="tile >= 1", got=f"tile = {tile}")
    if ids is None:
        ids = torch.arange(len(a), device=a.device)
    if ids.shape != a.shape[:1]:
        raise ShapeError("siglip ids", expected=f"shape (batch,) = ({len(a)},)", got=f"{tuple(ids.shape)}")
    return sum_over_pairs(a, b, scale, bias, ids, ids, tile) / len(a)


def sum_over_pairs(
    a: Float[Tensor, "row dim"], b: Float[Tensor, "column dim"], scale: float | Tensor, bias: float | Tensor,
    ids: Int[Tensor, " row"], other_ids: Int[Tensor, " column"], tile: int = TILE,
) -> Float[Tensor, ""]:  # fmt: skip
    """The sum over all pairs of ``-log sigma(y_ij (scale a_i b_j + bias))``, y = 1 where ids are equal."""
    scale, bias = (torch.as_tensor(x, dtype=exact(a).dtype, device=a.device) for x in (scale, bias))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale, bias))
    return _Tiles.apply(a, b, scale, bias, ids, other_ids, tile, wanted)  # type: ignore[return-value]


class _Tiles(torch.autograd.Function):
    """The gradients are made with the value, since the loss is one number: a tile is visited once."""

    @staticmethod
    def forward(ctx, a, b, scale, bias, ids, other_ids, tile, wanted):  # type: ignore[override]
        inputs = (a, b, scale, bias)
        with torch.autocast(a.device.type, enabled=False):
            a, b = exact(a), exact(b)
            # Many tiles are summed, so where the device has it the sum is in double precision.
            total = torch.zeros((), dtype=torch.float32 if a.is_mps else torch.float64, device=a.device)
            grads = (torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(total), torch.zeros_like(total))
            for i in range(0, len(a), tile):
                rows = slice(i, i + tile)
                for j in range(0, len(b), tile):
                    columns = slice(j, j + tile)
                    cosines = a[rows] @ b[columns].T
                    sign = (ids[rows, None] == other_ids[None, columns]).to(a.dtype) * 2 - 1
                    margin = sign * (scale * cosines + bias)
                    total += F.softplus(-margin).sum(dtype=total.dtype)
                    if wanted:
                        slope = -sign * torch.sigmoid(-margin)
                        grads[0][rows] += scale * (slope @ b[columns])
                        grads[1][columns] += scale * (slope.T @ a[rows])
                        grads[2].add_((slope * cosines).sum(dtype=total.dtype))
                        grads[3].add_(slope.sum(dtype=total.dtype))
        if wanted:
            # Unrounded: a gradient scaler multiplies what half precision would have lost.
            ctx.save_for_backward(*grads)
            ctx.dtypes = [x.dtype for x in inputs]
        return total.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        found = ((grad * part).to(dtype) for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *found, None, None, None, None


class SigLIP(PairLoss):
    """SigLIP with a learned scale and bias over any number of modalities and processes.

    ``L = mean over pairs of modalities of siglip(u_m, u_n, scale=exp(t), bias=b)``, t and b learned. There is no
    softmax, so a pair's loss needs none of the others: memory is constant in the batch, and small batches lose less
    than with ``InfoNCE``. With several processes, value and gradients are those of one process that has the whole
    batch, when gradients are averaged as data-parallel training does.

    Args:
        scale: s at the start.
        bias: b at the start.
        max_scale: t is held at log(max_scale) or below; None leaves it free, as the paper does.
        learn: False keeps both.
        anchor: compare this modality with each other one, and these not among themselves; None compares all pairs.
        widths, dim: name -> width of vectors that still have to be brought to a common ``dim``, by a linear layer each.
        gather: False compares samples within this process alone, as one that evaluates while others wait must.
        tile: as in ``siglip``.

    Raises:
        ConfigError: options out of range; in ``forward``, fewer than two modalities or an anchor that is not there.
        ShapeError: in ``forward``, vectors that do not fit each other.

    Reference: Zhai et al. (ICCV 2023); spec 7.2.
    Differs from the paper in: other processes' vectors are gathered, not passed around in a ring; the comparisons are
    the same, and vectors are small beside pairs.

    Example:
        >>> round(float(SigLIP()(torch.eye(2), torch.eye(2)).detach()), 6)
        0.693193
    """

    def __init__(
        self, *, scale: float = 10.0, bias: float = -10.0, max_scale: float | None = None, learn: bool = True,
        anchor: str | None = None, widths: dict[str, int] | None = None, dim: int | None = None, gather: bool = True,
        tile: int = TILE,
    ) -> None:  # fmt: skip
        super().__init__(anchor=anchor, widths=widths, dim=dim, gather=gather)
        if scale <= 0 or (max_scale is not None and scale > max_scale):
            raise ConfigError("SigLIP", expected=f"0 < scale <= max_scale = {max_scale}", got=f"scale = {scale}")
        if tile < 1:
            raise ConfigError("SigLIP", expected="tile >= 1", got=f"tile = {tile}")
        self.max_scale, self.tile = max_scale, tile
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn)

    def _prepare(self) -> None:
        if self.max_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))

    def _pair(self, pair: Pair) -> Float[Tensor, ""]:
        scale, bias = sync_parameter_grad(self.log_scale, pair.place).exp(), sync_parameter_grad(self.bias, pair.place)
        total = sum_over_pairs(pair.a, pair.all_b, scale, bias, pair.ids, pair.all_ids, self.tile)
        return total / len(pair.all_a)
