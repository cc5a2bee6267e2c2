"""SigLIP: a binary sigmoid loss over all pairs, computed in tiles."""

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
"""Rows and columns of a tile: memory is that of a few (512, 512) matrices, independent of the batch size."""


def siglip(
    a: Float[Tensor, "batch dim"],
    b: Float[Tensor, "batch dim"],
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    ids: Int[Tensor, " batch"] | None = None,
    tile: int = TILE,
) -> Float[Tensor, ""]:
    """Sigmoid loss ``L = -(1/batch) sum_ij log sigma(y_ij (scale a_i b_j + bias))``, y = 1 for positives, else -1.

    The (batch, batch) matrix is never materialized: loss and gradients are computed tile by tile. The result is
    independent of the tile size up to rounding. Second derivatives are not supported.

    Args:
        a, b: (batch, dim), normalized; row i of one is a positive of row i of the other.
        scale: factor s of the cosines.
        bias: added to every logit; -10 compensates for the many negatives at initialization.
        ids: (batch,) rows with equal ids are positives; only the diagonal by default.
        tile: number of rows and columns of a tile.

    Returns:
        The loss, in float32 or higher precision. Unlike InfoNCE it is defined without negatives, for a batch of one
        sample or of one id. Near 0 if all pairs are correct; log 2 for perfect vectors at s = 10 and bias = -10.

    Raises:
        ShapeError: a and b that do not match, an empty batch, ids of another shape. ConfigError: tile < 1.

    Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training (ICCV 2023), eq. 1.

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
    """Sum over all pairs of ``-log sigma(y_ij (scale a_i b_j + bias))``, y = 1 for equal ids, else -1."""
    scale, bias = (torch.as_tensor(x, dtype=exact(a).dtype, device=a.device) for x in (scale, bias))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale, bias))
    return _Tiles.apply(a, b, scale, bias, ids, other_ids, tile, needs_grad)  # type: ignore[return-value]


class _Tiles(torch.autograd.Function):
    """Computes the gradients in the forward pass, so that each tile is computed once."""

    @staticmethod
    def forward(ctx, a, b, scale, bias, ids, other_ids, tile, needs_grad):  # type: ignore[override]
        inputs = (a, b, scale, bias)
        with torch.autocast(a.device.type, enabled=False):
            a, b = exact(a), exact(b)
            # Accumulate many tiles in double precision if the device supports it.
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
                    if needs_grad:
                        slope = -sign * torch.sigmoid(-margin)
                        grads[0][rows] += scale * (slope @ b[columns])
                        grads[1][columns] += scale * (slope.T @ a[rows])
                        grads[2].add_((slope * cosines).sum(dtype=total.dtype))
                        grads[3].add_(slope.sum(dtype=total.dtype))
        if needs_grad:
            # Keep full precision: half precision could underflow before the gradient scaler's factor is applied.
            ctx.save_for_backward(*grads)
            ctx.dtypes = [x.dtype for x in inputs]
        return total.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        grads = ((grad * part).to(dtype) for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None


class SigLIP(PairLoss):
    """SigLIP with a learned scale and bias, for any number of modalities and processes.

    ``L = mean over pairs of modalities of siglip(u_m, u_n, scale=exp(t), bias=b)``, t and b learned. Without a softmax
    the pairs are independent: memory is constant in the batch size, and small batches lose less than with ``InfoNCE``.
    With several processes, after averaging gradients as in data-parallel training, value and gradients equal those of
    a single process with the whole batch.

    Args:
        scale: initial value of s.
        bias: initial value of b.
        max_scale: t is clamped to at most log(max_scale); None disables clamping, as in the paper.
        learn: False freezes both.
        anchor: compare only this modality with every other one; None compares all pairs.
        widths, dim: name -> width of the vectors, to project each modality to a common ``dim`` with a linear layer.
        gather: False compares samples within this process only, for example if only one process evaluates.
        tile: as in ``siglip``.

    Raises:
        ConfigError: options out of range; in ``forward``, fewer than two modalities or a missing anchor.
        ShapeError: in ``forward``, vectors that do not match.

    Reference: Zhai et al. (ICCV 2023).
    Differs from the paper in: vectors of other processes are gathered instead of passed around in a ring, with the same
    comparisons; vectors are small compared with pairs.

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
