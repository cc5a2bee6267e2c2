"""Batch sampler with a reproducible order, shared among processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DistributedSampler

from ..errors import ConfigError
from ..nn.distributed import rank_and_world
from .counter_rng import CounterRNG


class ResumableBatchSampler(DistributedSampler):
    """Yields (epoch, indices) of each batch; the order is a function of (seed, epoch) alone.

    ``batch_size`` is the size of the global batch. Each process takes an equal part of it, and the parts together are
    the batch of a single process, so that training on n processes computes the same result. In training, the last batch
    is truncated to a multiple of the number of processes; in evaluation, no sample is dropped or repeated.

    It subclasses DistributedSampler so that training frameworks do not replace it by their own. Unlike its parent, an
    item is a batch, and rank and world size are determined when iteration starts, because data is often loaded before
    the process group is initialized.

    Args:
        size: number of samples.
        batch_size: samples of a global batch.
        seed: seed of the run.
        shuffle: True in training; False keeps the stored order.
        drop_last: drop the last batch if it is incomplete.
        rank, world: this process and the number of processes; by default those of torch.distributed, or 0 and 1.
        steps_per_batch: how often each batch is repeated, for methods that train modalities in turn.
        weights: (size,) sampling weights: with ``shuffle``, an epoch draws ``size`` samples with replacement, each with
            probability proportional to its weight.
        ordered: yield positions in the order of the epoch, for data sets that shuffle by themselves.
        group: batches per optimizer step; a whole group is repeated, not each of its batches. With repetitions, an
            incomplete last group is dropped: otherwise two repetitions would share one optimizer step.
        limit: yield at most so many batches of each epoch; None for all.

    Raises:
        ConfigError: a batch size below 1, or one that does not divide among the processes; with repetitions, fewer
            batches than a group.

    Example:
        >>> list(ResumableBatchSampler(5, 2, seed=0, shuffle=False))
        [(0, tensor([0, 1])), (0, tensor([2, 3])), (0, tensor([4]))]
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, shuffle: bool, drop_last: bool = False,
        rank: int | None = None, world: int | None = None, steps_per_batch: int = 1, group: int = 1,
        weights: Tensor | None = None, ordered: bool = False, limit: int | None = None,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ConfigError("ResumableBatchSampler", expected="batch_size >= 1", got=f"{batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self._rank, self._world = rank, world
        self.steps_per_batch, self.group, self.weights = steps_per_batch, group, weights
        self.ordered, self.limit = ordered, limit
        self.epoch = 0
        self._resume: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batches: int) -> None:
        """Skips the first batches of one epoch, which an interrupted run has already used."""
        self._resume = epoch, batches

    def rank_and_world(self) -> tuple[int, int]:
        """Returns (rank, world size) of this process."""
        if self._rank is not None and self._world is not None:
            return self._rank, self._world
        return rank_and_world()

    def __iter__(self) -> Iterator[tuple[int, Int[Tensor, " batch"]]]:
        skipped = self._resume[1] if self._resume is not None and self._resume[0] == self.epoch else 0
        yield from itertools.islice(self._all(), skipped, self.limit)

    def _all(self) -> Iterator[tuple[int, Int[Tensor, " batch"]]]:
        rank, world = self.rank_and_world()
        order = None if self.ordered else torch.arange(self.size)
        if self.shuffle and order is not None:
            draws = CounterRNG(self.seed, self.epoch, order).uniform("order", 2 if self.weights is not None else 1)
            if self.weights is None:
                order = torch.argsort(draws[:, 0], stable=True)
            else:
                # Two numbers of 24 bits: one alone could not reach every sample of a large data set.
                fine = draws[:, 0].double() + draws[:, 1].double() * 2**-24
                total = self.weights.double().cumsum(dim=0)
                order = torch.searchsorted(total, fine * total[-1], right=True).clamp(max=self.size - 1)
        bounds = self._bounds(world)
        for first in range(0, len(bounds), self.group):
            for start, stop in bounds[first : first + self.group] * self.steps_per_batch:
                part = torch.arange(start, stop) if order is None else order[start:stop]
                yield self.epoch, part[rank::world]

    def __len__(self) -> int:
        count = len(self._bounds(self.rank_and_world()[1])) * self.steps_per_batch
        return count if self.limit is None else min(count, self.limit)

    def _bounds(self, world: int) -> list[tuple[int, int]]:
        fix = "batch_size counts the global batch: choose a multiple of the number of processes."
        if self.shuffle and self.batch_size % world:
            expected = f"a batch_size that {world} processes share equally"
            raise ConfigError("ResumableBatchSampler", expected=expected, got=f"{self.batch_size}", fix=fix)
        if self.batch_size < world:
            expected = f"a batch_size of at least {world}, one sample for each process"
            raise ConfigError("ResumableBatchSampler", expected=expected, got=f"{self.batch_size}", fix=fix)
        size = self.size - self.size % self.batch_size if self.drop_last else self.size
        if self.shuffle:
            size -= size % self.batch_size % world
        starts = list(range(0, size, self.batch_size))
        # Merge a last batch that has fewer samples than there are processes with the previous one.
        if len(starts) > 1 and size - starts[-1] < world:
            starts.pop()
        bounds = list(pairwise([*starts, size])) if starts else []
        if self.steps_per_batch == 1 or not bounds:
            return bounds
        if len(bounds) < self.group:
            raise ConfigError(
                "ResumableBatchSampler",
                expected=f"with steps_per_batch > 1, at least {self.group} batches per epoch, one optimizer step",
                got=f"{len(bounds)}",
                fix="Lower train.accumulate or train.batch_size.",
            )
        return bounds[: len(bounds) // self.group * self.group]
