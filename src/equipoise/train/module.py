"""The one LightningModule: task loss, unimodal heads, balancers, optimiser. Nobody copies a loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..balance import Balancer, Balancing
from ..diagnose.reading import watched
from ..diagnose.scores import SCORES, score
from ..errors import NonFiniteError
from ..model import FusionModel
from ..recipes import TrainOptions


class Training(pl.LightningModule):
    """Trains a FusionModel; balancers plug in.

    Args:
        model: what is trained.
        options: how.
        balancers: ``Balancing`` calls them in every step; give ``module.balancing`` to the ``Balance`` callback, which
            calls what happens once an epoch.
        seed: of dropout. Every epoch starts from a state that depends on the seed and the epoch alone, so a run that
            resumes at an epoch goes on exactly as it would have.

    Raises:
        NonFiniteError: a loss that is NaN or infinite, with the batch, and the modality whose input is.
    """

    def __init__(
        self, model: FusionModel, options: TrainOptions, *, balancers: Sequence[Balancer] = (), seed: int = 0
    ) -> None:
        super().__init__()
        self.model, self.options, self.seed = model, options, seed
        # Not registered: what they remember lies in the model, or in the Balance callback's state.
        self.balancing = Balancing(model, balancers)

    def forward(self, batch: Mapping[str, Any]):
        return self.model(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if batch_idx == 0:
            # Processes that train together drop different units; the first one drops what a single process would.
            torch.manual_seed((self.seed + 1_000_000 * self.global_rank) * 1_000_003 + self.current_epoch)
        output, target = self.model(batch), batch["target"]
        loss = self.balancing.loss(output, target)
        if not bool(torch.isfinite(loss)):
            raise self._not_finite(batch, batch_idx, loss)
        with torch.no_grad():
            task = self.model.loss(output.logits, target)
        self.log("loss", task, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(target), sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Gradients are accumulated, reduced and unscaled here, and not yet clipped.
        self.balancing.before_step()

    def on_validation_epoch_start(self) -> None:
        self._angles: dict[str, list[Tensor]] = {"cosine": [], "key_norm": []}

    def on_validation_epoch_end(self) -> None:
        if self._angles["cosine"] and len(self.model.names) > 1:
            first, *others = torch.cat(self._angles["cosine"]).nanmean(dim=(0, 1))
            self.log("air", (first - torch.stack(others).mean()).to(self.device), sync_dist=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with watched(self.model, self._angles):
            output = self.model(batch)
        target = batch["target"]
        found, task = score(output.logits, target, self.model.task), self.model.task
        self.log(f"val_{SCORES[task]}", found, prog_bar=True, batch_size=len(target), sync_dist=True)
        if output.share is not None:
            for index, name in enumerate(output.names):
                self.log(f"share/{name}", output.share[..., index].mean(), batch_size=len(target), sync_dist=True)

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
        for name in (*self.model.names, "target"):
            values = batch.get(name)
            if isinstance(values, Tensor) and not bool(torch.isfinite(values).all()):
                bad = (~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)).nonzero()[:, 0].tolist()
                index = batch["index"][bad[0]].item() if "index" in batch else bad[0]
                return NonFiniteError(
                    f"{where}, " + ("target" if name == "target" else f"modality '{name}'"), expected="finite values",
                    got=f"NaN or infinity in {len(bad)} of {len(values)} samples, the first has index {index}",
                    fix="Mend or drop that sample; the weights have not been touched by this batch.",
                )  # fmt: skip
        return NonFiniteError(
            where, expected="a finite loss", got=f"{float(loss.detach())} although all inputs are finite",
            fix="Lower train.learning_rate, set train.clip=1.0, or use train.precision=32-true.",
        )  # fmt: skip


class WarmupCosine:
    """Factor on the learning rate: rises linearly over the warm-up, then falls to 0 along a cosine.

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
