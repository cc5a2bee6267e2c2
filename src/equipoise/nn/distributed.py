"""The processes of a distributed training; a program without ``torch.distributed`` is one process."""

from __future__ import annotations

from torch import Tensor, distributed


def is_distributed() -> bool:
    """Returns whether a process group is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def all_reduce_sum(total: Tensor) -> Tensor:
    """Returns the sum over all processes; the tensor itself without a process group."""
    if is_distributed():
        total = total.detach().clone()
        distributed.all_reduce(total)
    return total
