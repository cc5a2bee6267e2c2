"""DataLoader over a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .dataset import Dataset
from .resumable_sampler import ResumableBatchSampler


@dataclass(frozen=True, eq=False)
class _BatchDataset(TorchDataset):
    """A split indexed by (epoch, indices), as ``ResumableBatchSampler`` yields them; each item is a whole batch."""

    dataset: Dataset
    split: str
    seed: int
    train: bool

    def __getitem__(self, key: tuple[int, Tensor]) -> dict[str, Tensor]:
        epoch, index = key
        return self.dataset.batch(self.split, index, seed=self.seed, epoch=epoch, train=self.train)

    def __len__(self) -> int:
        return len(self.dataset.split(self.split))


def loader(
    dataset: Dataset,
    split: str,
    batch_size: int,
    *,
    seed: int,
    train: bool,
    drop_last: bool = False,
    rank: int | None = None,
    world: int | None = None,
    steps_per_batch: int = 1,
    group: int = 1,
    workers: int = 0,
    limit: int | None = None,
) -> DataLoader:
    """Returns a DataLoader over the batches of a split.

    A batch depends only on the seed, the epoch and its position. Call ``loader.sampler.set_epoch(epoch)`` before each
    epoch (Lightning does this); a run resumed at epoch e then gets the same batches. Several processes share each
    batch, see ``ResumableBatchSampler``. The global RNG is not used.

    Args:
        dataset: as returned by ``load_dataset``.
        split: "train", "val" or "test".
        batch_size: samples per batch, summed over all processes.
        seed: seed of the order and the augmentation.
        train: shuffle and augment.
        drop_last: drop the last batch if it is incomplete.
        rank, world: this process and the number of processes; by default those of torch.distributed, or 0 and 1.
        steps_per_batch, group: how often each batch is served, and how many form an optimizer step; see
            ``ResumableBatchSampler``.
        workers: processes that read batches in advance; batches are the same for any number.
        limit: read at most so many batches of each epoch; None for all.

    Returns:
        DataLoader of dicts {name: (batch, ...), "target": (batch,), "index": (batch,)}. Its length is in batches.

    Raises:
        ConfigError: unknown split, or a batch size that does not divide among the processes.

    Example:
        >>> from equipoise.data import load_dataset
        >>> batches = loader(load_dataset("digits"), "train", 64, seed=0, train=True)
        >>> batches.sampler.set_epoch(3)
        >>> sorted(next(iter(batches)))
        ['audio', 'image', 'index', 'target']
    """
    order = ResumableBatchSampler(
        len(dataset.split(split)), batch_size, seed=seed, shuffle=train, drop_last=drop_last, rank=rank, world=world,
        steps_per_batch=steps_per_batch, group=group,
        weights=dataset.sampling_weights if train and split == "train" else None, ordered=dataset.ordered,
    )  # fmt: skip
    served = _BatchDataset(dataset, split, seed, train)
    # DataLoader draws one base seed; use a private generator so that the global RNG is not advanced.
    return DataLoader(
        served, batch_size=None, sampler=order, num_workers=workers, persistent_workers=workers > 0,
        generator=torch.Generator(),
    )  # fmt: skip
