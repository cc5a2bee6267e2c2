"""A torch DataLoader over a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .dataset import Dataset
from .resumable_sampler import ResumableBatchSampler


@dataclass(frozen=True, eq=False)
class _Served(TorchDataset):
    """A split whose items are whole batches, keyed by (epoch, indices) as Order yields them."""

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
    dataset: Dataset, split: str, batch_size: int, *, seed: int, train: bool,
    drop_last: bool = False, rank: int | None = None, world: int | None = None, steps_per_batch: int = 1, group: int = 1,
) -> DataLoader:  # fmt: skip
    """Batches of a split, for training loops that want a DataLoader.

    A batch depends on the seed, the epoch and the position alone: call ``loader.sampler.set_epoch(epoch)`` before
    each epoch (Lightning does), and a run that starts again at epoch e sees what the first one saw. Several processes
    share each batch, see ``Order``. The global generator is neither read nor moved.

    Args:
        dataset: what ``load`` returned.
        split: "train", "val" or "test".
        batch_size: samples of one batch, over all processes together.
        seed: of order and augmentation.
        train: shuffle and augment.
        drop_last: drop a last batch that is not full.
        rank, world: this process and the number of processes; by default those of torch.distributed, else 0 and 1.
        steps_per_batch, group: how often each batch is served, and how many form an optimizer step; see ``Order``.

    Returns:
        A DataLoader of dicts: name -> (batch, ...), "target" (batch,), "index" (batch,). Its length counts batches.

    Raises:
        ConfigError: an unknown split, or a batch size that the processes cannot share.

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
    )  # fmt: skip
    served = _Served(dataset, split, seed, train)
    # A DataLoader draws one number for its workers: from a generator of its own, so that the global one stays put.
    return DataLoader(served, batch_size=None, sampler=order, num_workers=0, generator=torch.Generator())
