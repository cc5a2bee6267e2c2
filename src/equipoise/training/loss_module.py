"""Training modules: the task loss of a fusion model with balancers, or the losses of a self-contained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..balance import Balancer, BalancerList
from ..diagnostics.prediction_collection import collect_with_attention
from ..diagnostics.task_scores import SCORES, task_score
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from ..nn.distributed import all_reduce_sum
from ..results.task_metrics import select_metrics
from .loop import TrainingLoop
from .recipes import TrainOptions


def gather_predictions(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Predictions and targets of all processes of a distributed training."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, parts)
    return [part for process_parts in every for part in process_parts]


class BalancedTraining(TrainingLoop):
    """Trains a FusionModel with balancers.

    Args:
        model: model to train.
        options: training options.
        balancers: called in every step through a ``BalancerList``; pass ``module.balancing`` to ``BalancerCallback``,
            which calls their hooks once per epoch.
        seed: seed of dropout, see ``TrainingLoop``.
        metrics: names of metrics that validation logs as ``val_<metric>``, over the whole split.

    Raises:
        ConfigError: an unknown metric, or one that is not defined for the task. NonFiniteError: the loss is NaN or
            infinite; the message names the batch and the modality with the bad input.
    """

    model: FusionModel

    def __init__(
        self, model: FusionModel, options: TrainOptions, *, balancers: Sequence[Balancer] = (), seed: int = 0,
        metrics: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(model, options, seed=seed)
        # The score of the task is logged in any case.
        self._metrics = [m for m in select_metrics(metrics, model.task, "train") if m.name != SCORES[model.task]]
        # Not registered as a module: its state is part of the model or of the BalancerCallback.
        self.balancing = BalancerList(model, balancers)

    def forward(self, batch: Mapping[str, Any]):
        return self.model(batch)

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        output, target = self.model(batch), batch["target"]
        loss = self.balancing.loss(output, target)
        with torch.no_grad():
            return loss, {"loss": self.model.loss(output.logits, target)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # At this point gradients are accumulated, reduced and unscaled, but not yet clipped.
        self.balancing.before_step()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._angles: dict[str, list[Tensor]] = {"cosine": [], "key_norm": []}
        self._predictions: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._angles["cosine"] and len(self.model.names) > 1:
            cosine = torch.cat(self._angles["cosine"])
            sums = torch.stack([cosine.nansum(dim=(0, 1)), (~cosine.isnan()).sum(dim=(0, 1)).to(cosine)])
            total, count = all_reduce_sum(sums.to(self.device))
            first, *others = total / count
            self.log("air", first - torch.stack(others).mean(), sync_dist=True)
        if self._metrics and self._predictions:
            logits, target = (torch.cat(parts) for parts in zip(*gather_predictions(self._predictions), strict=True))
            for metric in self._metrics:
                value = metric.evaluate(logits, target, self.model.task).value
                # Every process has computed it from all samples.
                self.log(f"val_{metric.name}", torch.tensor(value, device=self.device), sync_dist=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with collect_with_attention(self.model, self._angles):
            output = self.model(batch)
        target = batch["target"]
        score, task = task_score(output.logits, target, self.model.task), self.model.task
        self.add_to_mean(f"val_{SCORES[task]}", score, len(target))
        if self._metrics:
            self._predictions.append((output.logits.detach().float().cpu(), target.detach().cpu()))
        if output.share is not None:
            for index, name in enumerate(output.names):
                self.add_to_mean(f"share/{name}", output.share[..., index].mean(), len(target))


class SelfContainedTraining(TrainingLoop):
    """Trains a self-contained model, which defines its own losses; validation uses the same losses.

    Args:
        model: model to train.
        options: training options.
        seed: seed of dropout, see ``TrainingLoop``.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message names the batch and the modality with the bad input.
    """

    model: SelfContainedModel

    def __init__(self, model: SelfContainedModel, options: TrainOptions, *, seed: int = 0) -> None:
        super().__init__(model, options, seed=seed)
        self.balancing = BalancerList(model, ())  # type: ignore[arg-type]

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model.losses(batch)
        loss = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        parts = {f"loss/{name}": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return loss, {"loss": loss.detach(), **parts}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, _ = self.compute_loss(batch)
        self.add_to_mean("val_loss", loss, len(batch["target"]))
