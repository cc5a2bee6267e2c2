"""Base LightningModule: optimizer, schedule, seeding and loss checks; a subclass defines the loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..nn.distributed import all_reduce_sum
from ..tokens.masks import without_masked
from .recipes import TrainOptions


class TrainingLoop(pl.LightningModule, ABC):
    """Base class of training modules: seeds every epoch, checks every loss, builds optimizer and schedule.

    Args:
        model: model to train; if the loss is NaN, the inputs called ``model.names`` are checked for the cause.
        options: training options.
        seed: seed of dropout. The RNG state at the start of an epoch depends only on the seed and the epoch, so that a
            resumed run computes the same result.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message names the batch and the modality with the bad input.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, *, seed: int = 0) -> None:
        super().__init__()
        self.model, self.options, self.seed = model, options, seed

    @abstractmethod
    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch and the values to log, {name: tensor} including "loss"."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if batch_idx == 0:
            # Each rank draws other dropout masks; rank 0 draws those of a single process.
            torch.manual_seed((self.seed + 1_000_000 * self.global_rank) * 1_000_003 + self.current_epoch)
        loss, logs = self.compute_loss(batch)
        if not bool(torch.isfinite(loss)):
            raise self._not_finite(batch, batch_idx, loss)
        size = len(batch["target"])
        for name, value in logs.items():
            bar = name == "loss"
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=bar, batch_size=size, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._means: dict[str, list[tuple[Tensor, int]]] = {}

    def add_to_mean(self, name: str, value: Tensor, count: int) -> None:
        """Adds the mean of ``count`` validation samples to a mean over all samples of all processes."""
        self._means.setdefault(name, []).append((value.detach(), count))

    def on_validation_epoch_end(self) -> None:
        for name, parts in self._means.items():
            # Lightning's own reduction truncates the mean number of samples of a process to a whole number.
            count = torch.tensor([float(count) for _, count in parts])
            sums = torch.stack([value.float() for value, _ in parts]).cpu() * count
            total = all_reduce_sum(torch.stack([sums.double().sum(), count.double().sum()]).float().to(self.device))
            self.log(name, total[0] / total[1], prog_bar=name.startswith("val_"), sync_dist=True)

    def configure_optimizers(self) -> Any:
        options = self.options
        if options.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                self.parameters(),
                lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay,
            )  # fmt: skip
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(steps, options.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _not_finite(self, batch: dict[str, Any], batch_idx: int, loss: Tensor) -> NonFiniteError:
        where = f"training, epoch {self.current_epoch + 1}, batch {batch_idx + 1}"
        for name in (*_names(self.model), "target"):
            for values in self._read(batch, name):
                if bool(torch.isfinite(values).all()):
                    continue
                bad = (~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)).nonzero()[:, 0].tolist()
                index = batch["index"][bad[0]].item() if "index" in batch else bad[0]
                return NonFiniteError(
                    f"{where}, " + ("target" if name == "target" else f"modality '{name}'"), expected="finite values",
                    got=f"NaN or infinity in {len(bad)} of {len(values)} samples, the first has index {index}",
                    fix="Fix or drop that sample; the weights were not updated with this batch.",
                )  # fmt: skip
        return NonFiniteError(
            where, expected="a finite loss", got=f"{float(loss.detach())} although all inputs are finite",
            fix="Lower train.learning_rate, set train.clip=1.0, or use train.precision=32-true.",
        )  # fmt: skip

    def _read(self, batch: Mapping[str, Any], name: str) -> list[Tensor]:
        """Returns the tensors of a batch entry, with masked values set to zero."""
        masks = batch.get("mask")
        mask = masks.get(name) if isinstance(masks, Mapping) else None
        tokens_too = getattr(self.model, "_takes_mask", {}).get(name, True)
        value = batch.get(name)
        if isinstance(mask, Tensor):
            value = without_masked(value, mask.bool(), tokens_too=tokens_too)
        parts = value.values() if isinstance(value, Mapping) else [value]
        return [part for part in parts if isinstance(part, Tensor) and part.ndim]


def _names(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "names", ()))


class WarmupCosine:
    """Learning rate factor: linear warm-up, then cosine decay to 0.

    Example:
        >>> factor = WarmupCosine(100, warmup=0.1)
        >>> [round(factor(step), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, steps: int, warmup: float) -> None:
        self.steps, self.warm = max(steps, 1), int(max(steps, 1) * warmup)

    def __call__(self, step: int) -> float:
        if step < self.warm:
            return (step + 1) / self.warm
        done = (step - self.warm) / max(self.steps - self.warm, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
