"""Gathers batches across processes with exact gradients, as if one process had the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from ...nn.distributed import rank_and_world


class RankSlices(NamedTuple):
    """Position of this process's rows among those of all processes.

    Attributes:
        rank: rank of this process.
        sizes: number of rows of every process.
    """

    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])


def rank_slices(rows: int, device: torch.device, *, alone: bool = False) -> RankSlices:
    """Gathers the number of rows of every process, which may differ; ``alone`` skips communication."""
    rank, world = rank_and_world()
    if alone or world == 1:
        return RankSlices(0, (rows,))
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor([rows], device=device))
    return RankSlices(rank, tuple(int(size) for size in sizes))


def all_gather_with_grad(rows: Tensor, slices: RankSlices) -> Tensor:
    """Concatenates (row, ...) of all processes in rank order; a collective operation.

    The gradient of this process's rows is the sum of the gradients from all processes. Averaged over processes, as in
    data-parallel training, it is the gradient of the mean of their losses.
    """
    if len(slices.sizes) == 1:
        return rows
    if rows.dtype == torch.bool:
        return all_gather_with_grad(rows.to(torch.uint8), slices).bool()
    return _Gather.apply(rows, slices) if rows.is_floating_point() else _all(rows, slices)  # type: ignore[return-value]


def _all(rows: Tensor, slices: RankSlices) -> Tensor:
    most = max(slices.sizes)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in slices.sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, slices.sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, slices: RankSlices) -> Tensor:  # type: ignore[override]
        ctx.place = slices
        return _all(rows, slices)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        start = ctx.place.start
        return grad[start : start + ctx.place.sizes[ctx.place.rank]], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor) -> Tensor:  # type: ignore[override]
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad = grad.clone()
        distributed.all_reduce(grad)
        return grad / distributed.get_world_size()


def sync_parameter_grad(parameter: Tensor, slices: RankSlices) -> Tensor:
    """Returns the parameter; its gradient is averaged over processes (averaging it again has no effect)."""
    return parameter if len(slices.sizes) == 1 else _Shared.apply(parameter)  # type: ignore[return-value]


def global_mean(loss: Float[Tensor, ""], slices: RankSlices) -> Float[Tensor, ""]:
    """Returns the mean loss of all processes as value, with the gradient of this process's loss."""
    if len(slices.sizes) == 1:
        return loss
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return loss + (total / len(slices.sizes) - loss.detach())
