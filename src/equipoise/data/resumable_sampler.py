"""Which samples form which batch, in every epoch and on every process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DistributedSampler

from ..errors import ConfigError
from .counter_rng import CounterRNG


class ResumableBatchSampler(DistributedSampler):
    """Yields (epoch, indices) for one batch after the other; the order is a function of (seed, epoch) alone.

    ``batch_size`` is that of the global batch. Of each global batch every process takes an equal part, and the parts
    together are the batch that a single process would see: training on n processes is the same training. In training
    the last batch is cut to a multiple of the number of processes; in evaluation no sample is lost or seen twice.

    It is a DistributedSampler so that training frameworks do not put one of their own around it. It differs from its
    parent in that an item is a batch, and in that rank and world are looked up when iteration starts, because data
    are often loaded before the process group exists.

    Args:
        size: number of samples.
        batch_size: samples of one global batch.
        seed: of the run.
        shuffle: True in training; False keeps the stored order.
        drop_last: drop a last batch that is not full.
        rank, world: this process and the number of processes; by default those of torch.distributed, else 0 and 1.
        steps_per_batch: how often each batch is served, for methods that train in turns.
        group: batches that make one optimizer step; a whole group is served before it is served again. With several
            turns an epoch's last group is dropped where it is not whole, or turns would meet in one step.

    Raises:
        ConfigError: a batch size below 1, or one that does not divide among the processes; with several turns, fewer
            batches than a group.

    Example:
        >>> list(Order(5, 2, seed=0, shuffle=False))
        [(0, tensor([0, 1])), (0, tensor([2, 3])), (0, tensor([4]))]
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, shuffle: bool, drop_last: bool = False,
        rank: int | None = None, world: int | None = None, steps_per_batch: int = 1, group: int = 1,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ConfigError("Order", expected="batch_size >= 1", got=f"{batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self._rank, self._world = rank, world
        self.steps_per_batch, self.group = steps_per_batch, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Fixes the epoch that the next iteration serves."""
        self.epoch = epoch

    def place(self) -> tuple[int, int]:
        """(rank, world) of this process."""
        if self._rank is not None and self._world is not None:
            return self._rank, self._world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __iter__(self) -> Iterator[tuple[int, Int[Tensor, " batch"]]]:
        rank, world = self.place()
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.argsort(CounterRNG(self.seed, self.epoch, order).uniform("order", 1)[:, 0], stable=True)
        bounds = self._bounds(world)
        for first in range(0, len(bounds), self.group):
            for start, stop in bounds[first : first + self.group] * self.steps_per_batch:
                yield self.epoch, order[start:stop][rank::world]

    def __len__(self) -> int:
        return len(self._bounds(self.place()[1])) * self.steps_per_batch

    def _bounds(self, world: int) -> list[tuple[int, int]]:
        fix = "batch_size counts the global batch: choose a multiple of the number of processes."
        if self.shuffle and self.batch_size % world:
            expected = f"a batch_size that {world} processes share equally"
            raise ConfigError("Order", expected=expected, got=f"{self.batch_size}", fix=fix)
        if self.batch_size < world:
            expected = f"a batch_size of at least {world}, one sample for each process"
            raise ConfigError("Order", expected=expected, got=f"{self.batch_size}", fix=fix)
        size = self.size - self.size % self.batch_size if self.drop_last else self.size
        if self.shuffle:
            size -= size % self.batch_size % world
        starts = list(range(0, size, self.batch_size))
        # A last batch with fewer samples than processes would leave a process without any: it joins the one before.
        if len(starts) > 1 and size - starts[-1] < world:
            starts.pop()
        bounds = list(pairwise([*starts, size])) if starts else []
        if self.steps_per_batch == 1 or not bounds:
            return bounds
        if len(bounds) < self.group:
            raise ConfigError(
                "Order", expected=f"in turns, at least {self.group} batches in an epoch, for one optimizer step",
                got=f"{len(bounds)}", fix="Lower train.accumulate or train.batch_size.",
            )  # fmt: skip
        return bounds[: len(bounds) // self.group * self.group]
